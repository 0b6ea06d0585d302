"""Reader of documents in a text column of Parquet files."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from xlstm.dataset.document_block import DocumentBlock, RecordBlock, report_bad_record
from xlstm.dataset.file_content import foreign_content
from xlstm.dataset.json_records import shortened

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BLOCK_BYTES = 1 << 20
_MOST_ROWS = 1024


def parquet_blocks(path: str, text_column: str) -> Iterator[DocumentBlock]:
    """Splits a Parquet file into blocks.

    Args:
        path: The file.
        text_column: The column with the text. `a.b` is the field `b` of the struct column `a`,
            unless there is a column `a.b`.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: The file is damaged, or has no such text column.
        OSError: The file cannot be read.
    """
    import pyarrow.parquet  # Imported here because it takes half a second.

    # Without a buffer size, the column of a whole row group is read at once: perhaps gigabytes.
    options = {
        "buffer_size": _BLOCK_BYTES,
        "pre_buffer": False,
        "page_checksum_verification": True,
    }
    with open(path, "rb") as raw:
        head = raw.read(4096)
        problem = foreign_content(head)
        if problem and not head.startswith(b"PAR1"):
            raise ValueError(f"{path} holds {problem}")
        try:
            # Pass the open file: pyarrow accepts only paths in UTF-8.
            with pyarrow.parquet.ParquetFile(raw, **options) as file:
                yield from _blocks(path, file, text_column)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"cannot read {path} as Parquet: {reason}") from error


@dataclasses.dataclass(frozen=True)
class _ParquetRows(RecordBlock):
    """Rows of a text column, one document each."""

    path: str
    first: int
    column: "pyarrow.Array"

    def _numbered_texts(
        self, on_bad_record: Callable[[str], None] | None
    ) -> Iterator[tuple[int, str]]:
        try:
            values = self.column.to_pylist()
        except UnicodeDecodeError:
            yield from self._texts_one_by_one(on_bad_record)
            return
        for number, text in enumerate(values, self.first):
            yield number, text or ""  # A null is an empty document.

    def _texts_one_by_one(
        self, on_bad_record: Callable[[str], None] | None
    ) -> Iterator[tuple[int, str]]:
        for number, value in enumerate(self.column, self.first):
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                report_bad_record(f"{self._record_location(number)}: not UTF-8 text", on_bad_record)
            else:
                yield number, text or ""

    def _record_location(self, number: int) -> str:
        return f"{self.path}, row {number}"


def _blocks(
    path: str, file: "pyarrow.parquet.ParquetFile", text_column: str
) -> Iterator[_ParquetRows]:
    import pyarrow.compute

    names = _field_names(path, file.schema_arrow, text_column)
    dotted = ".".join(names)
    rows = _rows_in_block(file.metadata, dotted)
    done, position = 0, 0
    for batch in file.iter_batches(rows, columns=[dotted]):
        # For `a.b`, pyarrow reads both a column `a.b` and the field `b` of a struct column `a`.
        column = batch.column(batch.schema.get_field_index(names[0]))
        if len(names) > 1:
            column = pyarrow.compute.struct_field(column, names[1:])
        first, done = done + 1, done + batch.num_rows
        end = os.path.getsize(path) * done // file.metadata.num_rows
        yield _ParquetRows(end - position, path, first, column)
        position = end


def _rows_in_block(metadata: "pyarrow.parquet.FileMetaData", dotted: str) -> int:
    """Returns the number of rows that hold about a megabyte of text."""
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == dotted:
                size += column.total_uncompressed_size
    return max(1, min(_MOST_ROWS, _BLOCK_BYTES * metadata.num_rows // max(1, size)))


def _field_names(path: str, fields: Iterable["pyarrow.Field"], column: str) -> list[str]:
    """Returns the name of the text column, followed by the nested fields down to the text."""
    import pyarrow

    kinds = {field.name: field.type for field in fields}
    names = [field.name for field in fields]
    name, dot, rest = (column, "", "") if column in kinds else column.partition(".")
    if name not in kinds or (dot and not pyarrow.types.is_struct(kinds[name])):
        raise ValueError(f"{path} has no column {column!r}, only {shortened(names)}")
    if names.count(name) > 1:
        raise ValueError(f"{path} has {names.count(name)} columns {name!r}: rename one")
    kind = kinds[name]
    if dot:
        return [name, *_field_names(path, list(kind), rest)]
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null())
    if kind not in texts:
        raise ValueError(f"the column {name!r} of {path} holds {kind}: expected text")
    return [name]
