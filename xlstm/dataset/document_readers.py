"""Reads documents from files of text, JSON and Parquet, in blocks that can be parsed anywhere.

One process runs through the files and cuts them into blocks of about a megabyte; others parse the
blocks. So whatever the size of the input, little of it is in memory at a time (at least a document,
though: a text file is one).
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

from xlstm.dataset.compressed_file import CompressedFile
from xlstm.dataset.document_block import Block, RecordBlock, report_bad
from xlstm.dataset.file_content import decode_text
from xlstm.dataset.input_files import file_kind
from xlstm.dataset.json_records import json_blocks
from xlstm.dataset.parquet_records import parquet_blocks

_BLOCK_BYTES = 1 << 20


def read_blocks(paths: Sequence[str], text_column: str) -> Iterator[Block]:
    """Cuts files into blocks of documents: a JSON object, a Parquet row, any other file whole.

    Args:
        paths: The files, in the order that the documents shall have.
        text_column: The key or column with the text, in JSON and Parquet. `a.b` is the key or field
            `b` in `a`, unless there is one named `a.b`.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: A file is damaged, has no such column, or is of a kind that is not read.
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
    """Files of plain text, each a document; read, and decompressed, where they are parsed."""

    paths: tuple[str, ...]

    def _numbered_texts(self, on_bad: Callable[[str], None] | None) -> Iterator[tuple[int, str]]:
        for number, path in enumerate(self.paths):
            with CompressedFile(path) as file:
                content = file.read_all()
            try:
                text = decode_text(path, content)
            except ValueError as error:
                report_bad(str(error), on_bad)
            else:
                yield number, text

    def _place_of(self, number: int) -> str:
        return self.paths[number]


def _text_block(paths: Sequence[str]) -> Iterator[Block]:
    """Yields the block of some text files, if there are any."""
    if paths:
        yield _TextFiles(_total_bytes(paths), tuple(paths))


def _total_bytes(paths: Sequence[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)
