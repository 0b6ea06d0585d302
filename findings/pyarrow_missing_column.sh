#!/bin/sh
# pyarrow's ParquetFile passes over columns that are not there, and adds some that were not asked for.
#
# Expected: asking for a column that a file does not have raises, as `read_table` and pandas do on
#   the same file; asking for one column by its full name yields that column alone.
# What happens: `ParquetFile.iter_batches` and `read` leave a missing column out and say nothing, so
#   a mistyped name gives rows without columns. The name of a flat column that has a dot in it also
#   selects the field of a struct column: two columns come where one was named.
# Version: pyarrow 26.0.1.
# Decided in: pyarrow/parquet/core.py, ParquetFile._get_column_indices (a lookup with default) and
#   ParquetFile._build_nested_paths (joins the names of a path by dots).
#
# Output:
#   read_table, 'txt': ArrowInvalid
#   iter_batches, 'txt': 2 rows of []
#   iter_batches, 'text' and 'txt': 2 rows of ['text']
#   read_table, 'doc.text': ['doc.text']
#   iter_batches, 'doc.text': 2 rows of ['doc', 'doc.text']
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pyarrow==26.0.1 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import pyarrow
import pyarrow.parquet as parquet

doc = pyarrow.StructArray.from_arrays([pyarrow.array(["c", "d"])], ["text"])
columns = {"text": ["a", "b"], "doc": doc, "doc.text": ["e", "f"]}
parquet.write_table(pyarrow.table(columns), "table.parquet")
file = parquet.ParquetFile("table.parquet")


def show(*names):
    (batch,) = file.iter_batches(columns=list(names))
    wanted = " and ".join(map(repr, names))
    print(f"iter_batches, {wanted}: {batch.num_rows} rows of {batch.schema.names}")


try:
    print(f"read_table, 'txt': {parquet.read_table('table.parquet', columns=['txt'])}")
except pyarrow.ArrowInvalid as error:
    print(f"read_table, 'txt': {type(error).__name__}")
show("txt")
show("text", "txt")
table = parquet.read_table("table.parquet", columns=["doc.text"])
print(f"read_table, 'doc.text': {table.column_names}")
show("doc.text")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
