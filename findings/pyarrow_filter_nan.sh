#!/bin/sh
# Whether a filter of pyarrow keeps a NaN depends on how the Parquet file is cut into row groups.
#
# Expected: reading with `filters` gives the rows that filtering after reading gives. NaN is not equal
#   to 1, so `x != 1` keeps it.
# What happens: the statistics of a row group leave NaN out. A row group of 1 and NaN has 1 as its
#   least and its greatest value, so it is taken to be all 1 and skipped, NaN and all. The same rows
#   written as one row group keep it. `count_rows` counts too few, and even `is_nan` finds too few.
# Version: pyarrow 26.0.1.
# Decided in: cpp/src/arrow/dataset/file_parquet.cc of Arrow,
#   ParquetFileFragment::EvaluateStatisticsAsExpression (the range of the statistics is taken as a
#   guarantee for all rows).
#
# Output:
#   row groups of 4:
#     x != 1: filtered after reading [nan, 2.0], while reading [nan, 2.0], counted 2
#     is_nan(x): filtered after reading [nan], while reading [nan], counted 1
#   row groups of 2:
#     x != 1: filtered after reading [nan, 2.0], while reading [2.0], counted 1
#     is_nan(x): filtered after reading [nan], while reading [], counted 0
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pyarrow==26.0.1 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import pyarrow
import pyarrow.compute as compute
import pyarrow.dataset as dataset
import pyarrow.parquet as parquet

x = compute.field("x")
table = pyarrow.table({"x": [1.0, float("nan"), 1.0, 2.0]})
for rows in (4, 2):
    parquet.write_table(table, "table.parquet", row_group_size=rows)
    print(f"row groups of {rows}:")
    for name, test in (("x != 1", x != 1.0), ("is_nan(x)", compute.is_nan(x))):
        after = parquet.read_table("table.parquet").filter(test)["x"].to_pylist()
        read = parquet.read_table("table.parquet", filters=test)["x"].to_pylist()
        count = dataset.dataset("table.parquet").count_rows(filter=test)
        print(f"  {name}: filtered after reading {after}, while reading {read}, counted {count}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
