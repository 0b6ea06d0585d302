#!/bin/sh
# The table of lm_eval loses its headers if python-dateutil 4 is asked for.
#
# Expected: `lm_eval` has the headers "Tasks", "Version", "Filter", ... in every environment that its
#   requirements allow.
# What happens: pytablewriter, which writes the table, allows python-dateutil below 3 only, through
#   typepy. lm_eval sets no lower bound, so a resolver that must take python-dateutil 4 goes back to
#   pytablewriter 0.38 of 2019 (uv 0.13.9 does, in a second; pip searches for minutes, so the version
#   is named here). That knows no `headers`; it ignores the assignment, and the columns are A, B, C.
#   `pip check` finds nothing wrong.
# Version: lm_eval 0.4.13, pytablewriter 0.38.0, typepy 1.3.5, python-dateutil 4.0.0.
# Decided in: lm_eval's requirements (pytablewriter without a bound), lm_eval/utils.py, make_table.
#
# Output:
#   pytablewriter 0.38.0
#   | A | B | C | D | E | F | G | H | I |
#   newest pytablewriter
#   |Tasks|Version|Filter|n-shot|Metric| |Value| |Stderr|
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
cat > finding.py <<'PYTHON'
from lm_eval.utils import make_table

results = {
    "results": {"task": {"alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    "versions": {"task": 1},
    "n-shot": {"task": 0},
    "higher_is_better": {"task": {"acc": True}},
}
print(make_table(results).splitlines()[0])
PYTHON
table() {
  venv/bin/pip install --quiet lm_eval==0.4.13 "$@" >/dev/null 2>&1
  venv/bin/pip check >/dev/null
  venv/bin/python finding.py
}
{
  echo "pytablewriter 0.38.0"
  table python-dateutil==4.0.0 pytablewriter==0.38.0
  echo "newest pytablewriter"
  table 'pytablewriter>=1'
} | tr -s ' ' | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
