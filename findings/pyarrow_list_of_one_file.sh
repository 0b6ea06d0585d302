#!/bin/sh
# In pyarrow a Parquet file has one more column when it is read as a list of one file.
#
# Expected: `read_table("docs/lang=de/part.parquet")` and `read_table(["docs/lang=de/part.parquet"])`
#   give the same table.
# What happens: in a list the folders of each path count as partitions, all of them from the root on,
#   so `lang` is added as a column; for a path alone, or its folder, they do not count. If a folder is
#   called like a column, the list cannot be read at all. Moving the data to a folder with `=` in its
#   name thus changes its columns, or breaks it.
# Version: pyarrow 26.0.1.
# Decided in: pyarrow/parquet/core.py, ParquetDataset.__init__ (a single file is opened by itself, a
#   list with `partitioning="hive"`).
#
# Output:
#   docs/part.parquet: {'text': ['a', 'b']}
#   ['docs/part.parquet']: {'text': ['a', 'b']}
#   docs/lang=de/part.parquet: {'text': ['a', 'b']}
#   ['docs/lang=de/part.parquet']: {'text': ['a', 'b'], 'lang': ['de', 'de']}
#   docs/text=3/part.parquet: {'text': ['a', 'b']}
#   ['docs/text=3/part.parquet']: ArrowTypeError
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pyarrow==26.0.1 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import os

import pyarrow
from pyarrow.parquet import read_table, write_table

for folder in ("docs", "docs/lang=de", "docs/text=3"):
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/part.parquet"
    write_table(pyarrow.table({"text": ["a", "b"]}), path)
    for source in (path, [path]):
        try:
            found = read_table(source).to_pydict()
        except pyarrow.ArrowException as error:
            found = type(error).__name__
        print(f"{source}: {found}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
