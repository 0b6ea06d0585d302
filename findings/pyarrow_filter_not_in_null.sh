#!/bin/sh
# In filters of pyarrow "not in" keeps rows without a value, and "!=" removes them.
#
# Expected: `x not in ["a"]` selects the rows that `x != "a"` selects, as in SQL, where both pass over
#   null, or as in Python, where both keep None. Splitting a condition in two changes nothing.
# What happens: "not in" is computed as the inverse of "in", which is false for null, so null rows are
#   kept; "!=" gives null for them, so they are removed. `read_table` documents neither.
# Version: pyarrow 26.0.1.
# Decided in: pyarrow/parquet/core.py, filters_to_expression (`~field.isin(val)` beside `field != val`).
#
# Output:
#   [('x', '!=', 'a')]: ['b', 'c']
#   [('x', 'not in', ['a'])]: [None, 'b', 'c']
#   [('x', '!=', 'a'), ('x', '!=', 'b')]: ['c']
#   [('x', 'not in', ['a', 'b'])]: [None, 'c']
#   [('x', 'not in', ['a', None])]: ['b', 'c']
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

parquet.write_table(pyarrow.table({"x": ["a", None, "b", "c"]}), "table.parquet")
for filters in (
    [("x", "!=", "a")],
    [("x", "not in", ["a"])],
    [("x", "!=", "a"), ("x", "!=", "b")],
    [("x", "not in", ["a", "b"])],
    [("x", "not in", ["a", None])],
):
    print(f"{filters}: {parquet.read_table('table.parquet', filters=filters)['x'].to_pylist()}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
