#!/bin/sh
# In Grain an endless dataset can be batched by any number but one.
#
# Expected: `MapDataset.repeat()` without a number repeats forever, and `batch(1)` gives batches of one
#   element, as `batch(2)` gives batches of two.
# What happens: the length of the endless dataset is the largest integer. `batch` divides it as a float
#   and rounds it up, which by one gives an integer that is one too large: `len` raises, and so does
#   iterating. With `drop_remainder=True`, where integers are divided, it works.
# Version: grain 0.2.18.
# Decided in: grain/_src/python/dataset/transformations/batch.py, BatchMapDataset._get_length
#   (`math.ceil` of a float).
#
# Output:
#   batch(2, drop_remainder=False): length 4611686018427387904, first batch [0 1]
#   batch(1, drop_remainder=True): length 9223372036854775807, first batch [0]
#   batch(1, drop_remainder=False): length OverflowError, first batch OverflowError
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet grain==0.2.18 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from grain import MapDataset

for size, drop in ((2, False), (1, True), (1, False)):
    data = MapDataset.range(3).repeat().batch(size, drop_remainder=drop)
    found = []
    for compute in (lambda: len(data), lambda: next(iter(data))):
        try:
            found.append(str(compute()))
        except OverflowError as error:
            found.append(type(error).__name__)
    print(f"batch({size}, drop_remainder={drop}): length {found[0]}, first batch {found[1]}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
