"""Reads documents from text, JSONL and Parquet files, in blocks that can be parsed anywhere.

One process runs through the files and cuts them into blocks of about a megabyte; others parse the
blocks. So whatever the size of the input, little of it is in memory at a time (at least a document,
though: a text file is one).
"""

import abc
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Block(abc.ABC):
    """Some neighbouring documents of the input.

    Attributes:
        input_bytes: How much of the input it stands for, in bytes on the disk.
    """

    input_bytes: int

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """Yields the text of each document.

        Raises:
            ValueError: A document is malformed; says where.
            OSError: A file cannot be read.
        """


def read_blocks(paths: Sequence[str], text_column: str) -> Iterator[Block]:
    """Cuts files into blocks: `.jsonl[.gz]` a line a document, `.parquet` a row, others whole.

    Args:
        paths: The files, in the order that the documents shall have.
        text_column: The key or column with the text, in JSONL and Parquet.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: A file is damaged, or has no such column.
        OSError: A file cannot be read.
    """
    small_files: list[str] = []
    for path in paths:
        if path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            yield from _text_block(small_files)
            small_files = []
            yield from _rows(path, text_column)
        else:
            small_files.append(path)
            if _total_bytes(small_files) >= _BLOCK_BYTES:
                yield from _text_block(small_files)
                small_files = []
    yield from _text_block(small_files)


@dataclasses.dataclass(frozen=True)
class _TextFiles(Block):
    """Files of plain text, each a document."""

    paths: tuple[str, ...]

    def texts(self) -> Iterator[str]:
        for path in self.paths:
            with open(path, "rb") as file:
                content = file.read()
            try:
                yield content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                raise ValueError(
                    f"{path}, line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}); "
                    "only text, .jsonl, .jsonl.gz and .parquet files are read"
                ) from error


@dataclasses.dataclass(frozen=True)
class _JsonLines(Block):
    """Lines of a JSONL file, each an object with the document's text; blank lines are skipped."""

    path: str
    first_line: int
    lines: list[bytes]
    text_column: str

    def texts(self) -> Iterator[str]:
        for number, line in enumerate(self.lines, self.first_line):
            if line.strip():
                try:
                    yield self._text(line)
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {number}: {error}") from error

    def _text(self, line: bytes) -> str:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text (byte 0x{line[error.start]:02x})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(record, dict):
            raise ValueError(f"not a JSON object, but {_shortened(record)}")
        if self.text_column not in record:
            raise ValueError(f"no {self.text_column!r} among its keys {_shortened(list(record))}")
        text = record[self.text_column]
        if not isinstance(text, str | None):
            raise ValueError(f"{self.text_column!r} is not a string, but {_shortened(text)}")
        text = text or ""  # A null is an empty document.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.text_column!r} is not valid Unicode: {error.reason}"
            ) from error
        return text


@dataclasses.dataclass(frozen=True)
class _ParquetRows(Block):
    """Rows of a Parquet file's text column, each a document."""

    path: str
    first_row: int
    column: "pyarrow.Array"

    def texts(self) -> Iterator[str]:
        for number, value in enumerate(self.column, self.first_row):
            try:
                yield value.as_py() or ""
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}, row {number}: not UTF-8 text") from error


def _text_block(paths: Sequence[str]) -> Iterator[Block]:
    """Yields the block of some text files, if there are any."""
    if paths:
        yield _TextFiles(_total_bytes(paths), tuple(paths))


def _total_bytes(paths: Sequence[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def _rows(path: str, text_column: str) -> Iterator[Block]:
    """Yields the blocks of a JSONL or Parquet file."""
    if path.endswith(".parquet"):
        return _parquet_blocks(path, text_column)
    return _json_blocks(path, text_column)


def _json_blocks(path: str, text_column: str) -> Iterator[Block]:
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.endswith(".gz") else raw
        first_line, position = 1, 0
        try:
            while lines := file.readlines(_BLOCK_BYTES):
                yield _JsonLines(raw.tell() - position, path, first_line, lines, text_column)
                first_line, position = first_line + len(lines), raw.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _parquet_blocks(path: str, text_column: str) -> Iterator[Block]:
    import pyarrow.parquet  # Here, since it takes half a second.

    try:
        # Otherwise a row group's whole column is read at once, which may be gigabytes.
        streaming = {"buffer_size": _BLOCK_BYTES, "pre_buffer": False}
        with pyarrow.parquet.ParquetFile(path, **streaming) as file:
            _check_column(path, file.schema_arrow, text_column)
            done, position = 0, 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_column]):
                first_row, done = done + 1, done + batch.num_rows
                end = os.path.getsize(path) * done // file.metadata.num_rows
                yield _ParquetRows(end - position, path, first_row, batch.column(0))
                position = end
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot read {path} as Parquet: {reason}") from error


def _check_column(path: str, schema: "pyarrow.Schema", text_column: str) -> None:
    """Raises ValueError unless the column is there and holds text."""
    import pyarrow

    if text_column not in schema.names:
        raise ValueError(f"{path} has no column {text_column!r}, only {_shortened(schema.names)}")
    kind = schema.field(text_column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    if kind not in texts:
        raise ValueError(f"the column {text_column!r} of {path} holds {kind}, not text")


def _shortened(value: object) -> str:
    """Returns how a value is written in JSON, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
