"""Sequential reading of files that may be compressed: gzip, zstd, bzip2 and xz."""

import bz2
import lzma
import os
import re
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Protocol

from xlstm.dataset.file_content import foreign_content
from xlstm.files import naming_file

_CHUNK_BYTES = 1 << 17
_NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_MAGIC_BYTES = {
    ".gz": rb"\x1f\x8b",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # The others are skippable frames.
    ".bz2": rb"BZh",
    ".xz": rb"\xfd7zXZ\0",
}


def split_compression(path: str) -> tuple[str, str]:
    """Splits a path into the name of the decompressed file and the compression extension.

    Args:
        path: The path of a file; the case of its extension does not matter.

    Returns:
        The path without the extension, and the extension in lower case; for other files, the path
        and "".
    """
    root, extension = os.path.splitext(path)
    return (root, extension.lower()) if extension.lower() in _NAMES else (path, "")


class CompressedFile:
    """The content of a file, decompressed if its extension says so; a context manager.

    Concatenated members, frames and streams are one content, as for the tools `gzip`, `zstd`,
    `bzip2` and `xz`. A truncated content, or other data after it, is an error.
    """

    def __init__(self, path: str):
        """Opens a file.

        Args:
            path: Its path.

        Raises:
            ValueError: The file is not compressed as its extension says.
            OSError: The file cannot be read.
        """
        self._path = path
        self._raw = open(path, "rb")
        try:
            self._read_some = self._opened(split_compression(path)[1])
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> "CompressedFile":
        """Returns the file."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._raw.close()

    @property
    def position(self) -> int:
        """The number of bytes read from the disk so far."""
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        """Reads the next bytes.

        Args:
            size: The number of bytes.

        Returns:
            `size` bytes, or fewer at the end.

        Raises:
            ValueError: The compressed data is damaged or truncated.
            OSError: The file cannot be read.
        """
        pieces = []
        try:
            with naming_file(self._path):
                while size and (piece := self._read_some(size)):
                    pieces.append(piece)
                    size -= len(piece)
        except (zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if "too much memory" in str(error):
                raise ValueError(
                    f"{self._path} is compressed with a window of more than 128 MB: compress it "
                    "again, without --long"
                ) from error
            name = _NAMES[split_compression(self._path)[1]]
            raise ValueError(f"{self._path} is not a complete {name} file: {error}") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_all(self) -> bytes:
        """Returns the rest of the content; see `read`."""
        return b"".join(iter(lambda: self.read(1 << 26), b""))

    def _opened(self, extension: str) -> Callable[[int], bytes]:
        """Returns a function that reads at most a given number of bytes of the content."""
        if not extension:
            return self._raw.read
        head = self._raw.peek(4096)
        if not _starts(extension, head):
            what = foreign_content(head) or (repr(head[:16]) if head else "nothing")
            raise ValueError(
                f"{self._path} is not a complete {_NAMES[extension]} file: it holds {what}"
            )
        if extension == ".zst":
            import pyarrow  # Imported here because it takes half a second.

            return pyarrow.CompressedInputStream(self._raw, "zstd").read
        return _Members(self._raw, extension).read


def _starts(extension: str, head: bytes) -> bool:
    """Returns whether `head` starts a compressed member."""
    return re.match(_MAGIC_BYTES[extension], head) is not None


class _Decoder(Protocol):
    """The common interface of the decompressors of `bz2` and `lzma`."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """A decompressor of one gzip member, with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self):
        self._decoder = zlib.decompressobj(wbits=31)

    eof = property(lambda self: self._decoder.eof)
    needs_input = property(lambda self: not self._decoder.unconsumed_tail)
    unused_data = property(lambda self: self._decoder.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    ".gz": _GzipDecoder,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


class _Members:
    """The content of consecutive gzip members, bzip2 streams or xz streams.

    The file objects of the standard library ignore data after the last bzip2 or xz stream.
    """

    def __init__(self, raw: BinaryIO, extension: str):
        self._raw = raw
        self._extension = extension
        self._decoder = _DECODERS[extension]()

    def read(self, size: int) -> bytes:
        """Reads at most `size` bytes, and none only at the end."""
        content = b""
        while not content:
            data, is_last = b"", False
            if self._decoder.eof:
                data = self._next_member()
                if not data:
                    return b""
                self._decoder = _DECODERS[self._extension]()
            elif self._decoder.needs_input:
                data = self._raw.read(_CHUNK_BYTES)
                is_last = not data
            content = self._decoder.decompress(data, size)
            if is_last and not content and not self._decoder.eof:
                raise EOFError("its end is missing")
        return content

    def _next_member(self) -> bytes:
        """Returns the first bytes of the next member; none at the end of the file."""
        rest = self._decoder.unused_data
        # Gzip and xz files may be padded with NUL bytes.
        while not (rest := rest.lstrip(b"\0")):
            rest = self._raw.read(_CHUNK_BYTES)
            if not rest:
                return b""
        rest += self._raw.read(16)
        if not _starts(self._extension, rest):
            raise EOFError(f"other data follows its end: {rest[:16]!r}")
        return rest
