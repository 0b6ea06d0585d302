"""Standard streams that a long run outlives: what cannot be written is dropped, not raised.

The reader of a pipe ends, a terminal closes or is paused, the disk with the log is full: that is no
reason to stop.
"""

import errno
import io
import os
import select
import time
from collections.abc import Callable
from typing import TextIO

# A stream that takes nothing for so many seconds, such as a paused terminal, is lost as well.
_PATIENCE = 10.0
_SECONDS_BETWEEN_TRIES = 0.01


class _SteadyFile(io.RawIOBase):
    """A file that takes everything."""

    def __init__(self, descriptor: int, on_loss: Callable[[str], None]):
        super().__init__()
        self._descriptor, self._on_loss = descriptor, on_loss
        self._sink = _open_without_waiting(descriptor)
        self.is_lost = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: memoryview) -> int:
        try:
            written = self._write_a_part(data)
        except OSError as error:
            was_lost, self.is_lost = self.is_lost, True
            if not was_lost:
                self._on_loss(error.strerror)
            return len(data)
        self.is_lost = False
        return written

    def _write_a_part(self, data: memoryview) -> int:
        deadline = time.monotonic() + (0.0 if self.is_lost else _PATIENCE)
        while True:
            seconds = max(deadline - time.monotonic(), 0.0)
            if select.select([], [self._sink], [], seconds)[1]:
                try:
                    # A pipe that is ready for writing takes so much without waiting.
                    return os.write(self._sink, data[: select.PIPE_BUF])
                except BlockingIOError:  # A terminal has less room than the next character takes.
                    time.sleep(_SECONDS_BETWEEN_TRIES)
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")


def _open_without_waiting(descriptor: int) -> int:
    """Opens a terminal once more, so that a write takes what there is room for.

    A terminal is ready for writing as soon as it has room for a character, and a longer text would
    be waited for: without an end, if the connection behind it stalls. The descriptor itself belongs
    to other programs as well and stays as it is; it is returned if the terminal cannot be opened.
    """
    try:
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # Usually it is no terminal.
        return descriptor


_files: list[_SteadyFile] = []


def make_steady(stream: TextIO, on_loss: Callable[[str], None] = lambda reason: None) -> TextIO:
    """Makes a stream that never fails.

    It goes on trying: a disk may have room again.

    Args:
        stream: A stream on a file descriptor, to which nobody writes from now on.
        on_loss: Called with the reason whenever it can be written no more.

    Returns:
        A stream on the same descriptor. Characters that its encoding lacks are written as escapes.
    """
    file = _SteadyFile(stream.fileno(), on_loss)
    _files.append(file)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
    )


def is_output_lost() -> bool:
    """Whether what is shown to the user goes nowhere at present."""
    return any(file.is_lost for file in _files)
