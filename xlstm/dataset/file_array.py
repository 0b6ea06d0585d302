"""A file as an array whose slices are read on demand."""

import os
import stat
import weakref

import numpy as np
from numpy.typing import DTypeLike

from xlstm.files import naming_file


class FileArray:
    """The elements of a file, which stays open.

    If the file shrinks or its disk fails, reading raises an exception; a memory-mapped file would
    end the process (SIGBUS). Several threads may read at once. A file that replaces it at the same
    path is ignored.

    Attributes:
        path: The file.
        dtype: The type of an element.
        num_bytes: The size of the file when it was opened.
    """

    def __init__(self, path: str, dtype: DTypeLike):
        """Opens a file.

        Args:
            path: The file.
            dtype: The type of an element.

        Raises:
            OSError: The file cannot be opened, or is a folder, a pipe or a device.
        """
        self.path, self.dtype = path, np.dtype(dtype)
        # Opening a pipe without O_NONBLOCK would wait for a writer.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file", path)
        self.num_bytes = status.st_size
        self._length = status.st_size // self.dtype.itemsize

    @property
    def stat_signature(self) -> tuple[int, ...]:
        """Size, times in ns, inode and device, which change whenever the file changes."""
        status = os.fstat(self._descriptor)
        return (
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,  # Unlike the modification time, nobody can set it.
            status.st_ino,
            status.st_dev,
        )

    def __len__(self) -> int:
        """Returns the number of elements when the file was opened."""
        return self._length

    def __getitem__(self, key: int | slice) -> np.ndarray | np.generic:
        """Reads an element or a slice.

        Raises:
            ValueError: The file has shrunk, or the slice has a step.
            OSError: The file cannot be read.
        """
        if not isinstance(key, slice):
            index = range(self._length)[key]
            return self._read(index, index + 1)[0]
        start, stop, step = key.indices(self._length)
        if step != 1:
            raise ValueError(f"a slice of a file cannot have a step, but has step {step}")
        return self._read(start, max(start, stop))

    def _read(self, start: int, stop: int) -> np.ndarray:
        pieces, position, end = [], start * self.dtype.itemsize, stop * self.dtype.itemsize
        while position < end:  # One call reads at most 2 GB.
            with naming_file(self.path):
                piece = os.pread(self._descriptor, end - position, position)
            if not piece:
                raise ValueError(
                    f"{self.path} has shrunk while it was in use: expected {self.num_bytes:,}"
                    f" bytes, but it ends before byte {end:,}"
                )
            pieces.append(piece)
            position += len(piece)
        return np.frombuffer(b"".join(pieces), self.dtype)
