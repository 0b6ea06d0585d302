#!/bin/sh
# Grain turns integers of 64 bits into floats when it batches them, and their last digits are lost.
#
# Expected: a batch of Python integers is an array of integers. Hashes and document numbers of up to 64
#   bits fit into uint64, and one that is at least 2^63 becomes uint64 when it is alone.
# What happens: each element becomes an array with a dtype of its own first, int64 below 2^63 and uint64
#   from there on. The two have no common integer dtype, and stacking them gives float64. Whether a
#   hash keeps its digits thus depends on its neighbors in the batch.
# Version: grain 0.2.18 with numpy 2.4.6.
# Decided in: grain/_src/python/dataset/transformations/batch.py, make_batch (`np.stack`).
#
# Output:
#   (4611686018427387905, 4611686018427387905): int64, kept
#   (9223372036854775809, 9223372036854775809): uint64, kept
#   (4611686018427387905, 9223372036854775809): float64, [4611686018427387904, 9223372036854775808]
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet grain==0.2.18 numpy==2.4.6 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from grain import MapDataset


def show(*hashes):
    (batch,) = MapDataset.source([{"hash": x} for x in hashes]).batch(len(hashes))
    found = [int(x) for x in batch["hash"]]
    print(f"{hashes}: {batch['hash'].dtype}, {'kept' if found == list(hashes) else found}")


small, large = 2**62 + 1, 2**63 + 1
show(small, small)
show(large, large)
show(small, large)
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
