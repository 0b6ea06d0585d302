#!/bin/sh
# Grain's WindowShuffleMapDataset loses elements if the length is no multiple of the window.
#
# Expected: a shuffle gives every element once. The docstring promises a one-to-one mapping without
#   repeats in a window; the twin for iterators (WindowShuffleIterDataset) does keep it.
# What happens: the last window is shuffled as if it were full. Its indices reach beyond the end, where
#   a MapDataset starts again from the front: elements of the last window are missing and the first
#   ones come twice. A window larger than the data has the same effect. Nothing is raised.
# Version: grain 0.2.18.
# Decided in: grain/_src/python/dataset/transformations/shuffle.py,
#   WindowShuffleMapDataset._shuffled_index (`max_index` is that of a full window).
#
# Output:
#   map, 12 elements, window 4: [1, 2, 3, 0, 4, 7, 5, 6, 10, 11, 8, 9], missing []
#   map, 10 elements, window 4: [1, 2, 3, 0, 4, 7, 5, 6, 0, 1], missing [8, 9]
#   map, 6 elements, window 20: [1, 1, 3, 0, 0, 2], missing [4, 5]
#   iter, 10 elements, window 4: [0, 3, 2, 1, 6, 5, 7, 4, 9, 8], missing []
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet grain==0.2.18 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from grain import MapDataset
from grain.experimental import WindowShuffleIterDataset, WindowShuffleMapDataset


def show(name, length, window, elements):
    missing = sorted(set(range(length)) - set(elements))
    print(f"{name}, {length} elements, window {window}: {elements}, missing {missing}")


for length, window in ((12, 4), (10, 4), (6, 20)):
    data = MapDataset.range(length)
    show("map", length, window, list(WindowShuffleMapDataset(data, window_size=window, seed=1)))
data = MapDataset.range(10).to_iter_dataset()
show("iter", 10, 4, [int(x) for x in WindowShuffleIterDataset(data, window_size=4, seed=1)])
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
