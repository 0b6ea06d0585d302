"""Standard streams that never fail: text that cannot be written is dropped.

A long run continues when the reader of a pipe ends, when a terminal closes or is paused, and when
the disk that holds the log is full.
"""

import errno
import io
import os
import select
import time
from collections.abc import Callable
from typing import TextIO

# Seconds after which a stream that accepts nothing, such as a paused terminal, counts as lost.
_PATIENCE = 10.0
_SECONDS_BETWEEN_TRIES = 0.01


class _SteadyFile(io.RawIOBase):
    """A file whose writes always succeed."""

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
                    # A pipe that is ready for writing accepts this much without blocking.
                    return os.write(self._sink, data[: select.PIPE_BUF])
                except BlockingIOError:  # Too full for the next character.
                    time.sleep(_SECONDS_BETWEEN_TRIES)
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")


def _open_without_waiting(descriptor: int) -> int:
    """Opens a terminal a second time, in non-blocking mode.

    A terminal counts as ready when it has room for one character, so a longer blocking write could
    wait without end if its connection stalls. The descriptor itself is shared with other programs
    and stays blocking. It is returned unchanged if it is not a terminal that can be opened.
    """
    try:
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # Usually it is not a terminal.
        return descriptor


_files: list[_SteadyFile] = []


def make_steady(stream: TextIO, on_loss: Callable[[str], None] = lambda reason: None) -> TextIO:
    """Returns a stream that never fails.

    It retries at every write, because a full disk may have room again.

    Args:
        stream: A stream on a file descriptor; write to the new stream only from now on.
        on_loss: Called with the reason each time the stream can no longer be written.

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
    """Returns whether output to the user is currently being dropped."""
    return any(file.is_lost for file in _files)
