"""Readers of text, JSON and Parquet files, which split them into blocks of documents.

One thread splits the files into blocks of about a megabyte, others parse the blocks. Memory use
does not grow with the input, but at least one document must fit: a text file is one document.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

from xlstm.dataset.compressed_file import CompressedFile
from xlstm.dataset.document_block import DocumentBlock, RecordBlock, report_bad_record
from xlstm.dataset.file_content import decode_text
from xlstm.dataset.input_files import file_kind
from xlstm.dataset.json_records import json_blocks
from xlstm.dataset.parquet_records import parquet_blocks

_BLOCK_BYTES = 1 << 20


def read_blocks(paths: Sequence[str], text_column: str) -> Iterator[DocumentBlock]:
    """Splits files into blocks of documents.

    A document is a JSON object, a Parquet row, or any other file as a whole.

    Args:
        paths: The files, in the order of their documents.
        text_column: The key or column of the text in JSON and Parquet. `a.b` is the key or field
            `b` in `a`, unless one is named `a.b`.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: A file is damaged, lacks the column, or is of an unsupported kind.
        OSError: A file cannot be read.
    """
    small_files: list[str] = []
    for path in paths:
        kind = file_kind(path)
        if kind == "text":
            small_files.append(path)
            if _total_bytes(small_files) >= _BLOCK_BYTES:
                yield from _text_block(small_files)
                small_files = []
            continue
        yield from _text_block(small_files)
        small_files = []
        if kind == "parquet":
            yield from parquet_blocks(path, text_column)
        else:
            yield from json_blocks(path, text_column, is_lines=kind == "json_lines")
    yield from _text_block(small_files)


@dataclasses.dataclass(frozen=True)
class _TextFiles(RecordBlock):
    """Plain text files, one document each; they are read and decompressed when parsed."""

    paths: tuple[str, ...]

    def _numbered_texts(
        self, on_bad_record: Callable[[str], None] | None
    ) -> Iterator[tuple[int, str]]:
        for number, path in enumerate(self.paths):
            with CompressedFile(path) as file:
                content = file.read_all()
            try:
                text = decode_text(path, content)
            except ValueError as error:
                report_bad_record(str(error), on_bad_record)
            else:
                yield number, text

    def _record_location(self, number: int) -> str:
        return self.paths[number]


def _text_block(paths: Sequence[str]) -> Iterator[DocumentBlock]:
    """Yields the block of some text files, or nothing without files."""
    if paths:
        yield _TextFiles(_total_bytes(paths), tuple(paths))


def _total_bytes(paths: Sequence[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)
