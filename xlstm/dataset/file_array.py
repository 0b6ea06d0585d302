"""A file as an array that is read piece by piece."""

import os
import stat
import weakref

import numpy as np
from numpy.typing import DTypeLike

from xlstm.files import naming_file


class FileArray:
    """The elements of a file, which stays open.

    Unlike a mapped file, one that shrinks or whose disk fails is an exception and not the end of
    the process (SIGBUS). Threads may read at the same time. A file that takes the path later plays
    no part.

    Attributes:
        path: The file.
        dtype: Of an element.
        num_bytes: The size of the file when it was opened.
    """

    def __init__(self, path: str, dtype: DTypeLike):
        """Opens a file.

        Args:
            path: The file.
            dtype: Of an element.

        Raises:
            OSError: It cannot be opened, or is a folder, a pipe or a device.
        """
        self.path, self.dtype = path, np.dtype(dtype)
        # A pipe that nobody writes to would be waited for.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no ordinary file", path)
        self.num_bytes = status.st_size
        self._length = status.st_size // self.dtype.itemsize

    @property
    def facts(self) -> tuple[int, ...]:
        """What differs after the file has changed: size, times in ns, inode and device."""
        status = os.fstat(self._descriptor)
        return (
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,  # Unlike the other it cannot be set.
            status.st_ino,
            status.st_dev,
        )

    def __len__(self) -> int:
        """Returns the number of elements that the file had when it was opened."""
        return self._length

    def __getitem__(self, key: int | slice) -> np.ndarray | np.generic:
        """Reads an element, or the elements of a slice.

        Raises:
            ValueError: The file has become too short, or the slice has a step.
            OSError: It cannot be read.
        """
        if not isinstance(key, slice):
            index = range(self._length)[key]
            return self._read(index, index + 1)[0]
        start, stop, step = key.indices(self._length)
        if step != 1:
            raise ValueError(f"a file is read in one piece, not in steps of {step}")
        return self._read(start, max(start, stop))

    def _read(self, start: int, stop: int) -> np.ndarray:
        pieces, place, end = [], start * self.dtype.itemsize, stop * self.dtype.itemsize
        while place < end:  # One call reads at most 2 GB.
            with naming_file(self.path):
                piece = os.pread(self._descriptor, end - place, place)
            if not piece:
                raise ValueError(
                    f"{self.path} has shrunk while it was in use: it ends before byte {end:,} of"
                    f" the {self.num_bytes:,} that it had"
                )
            pieces.append(piece)
            place += len(piece)
        return np.frombuffer(b"".join(pieces), self.dtype)
