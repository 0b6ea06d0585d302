#!/bin/sh
# A slice of safetensors takes a negative index, but no negative bound and none beyond the end.
#
# Expected: what `get_slice` returns is sliced like a list, a NumPy array or a torch tensor: a negative
#   bound counts from the end and one beyond the end is cut. It takes steps, "..." and -1 as an index,
#   and gives an empty part for [1:1].
# What happens: -1 as a bound raises an OverflowError, and a bound beyond the end raises as well. A
#   loop that reads fixed numbers of rows raises at the last part, and rows split among more readers
#   than there are rows raise for those that get none.
# Version: safetensors 0.8.0 with numpy 2.4.6.
# Decided in: bindings/python/src/lib.rs of safetensors, slice_to_indexer (bounds are read as unsigned
#   integers), and safetensors/src/slice.rs (InvalidSlice::SliceOutOfRange).
#
# Output:
#   [-1]: numpy [3, 4, 5], safetensors [3, 4, 5]
#   [::2]: numpy [[0, 1, 2]], safetensors [[0, 1, 2]]
#   [-1:]: numpy [[3, 4, 5]], safetensors OverflowError: can't convert negative int to unsigned
#   [:-1]: numpy [[0, 1, 2]], safetensors OverflowError: can't convert negative int to unsigned
#   [0:3]: numpy [[0, 1, 2], [3, 4, 5]], safetensors SafetensorError:  out of bounds for tensor dimension #0 of size 2
#   [1:1]: numpy [], safetensors []
#   [2:4]: numpy [], safetensors SafetensorError:  out of bounds for tensor dimension #0 of size 2
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

array = np.arange(6).reshape(2, 3)
save_file({"x": array}, "file.safetensors")
part = safe_open("file.safetensors", "numpy").get_slice("x")
for name, index in {
    "[-1]": -1,
    "[::2]": np.s_[::2],
    "[-1:]": np.s_[-1:],
    "[:-1]": np.s_[:-1],
    "[0:3]": np.s_[0:3],
    "[1:1]": np.s_[1:1],
    "[2:4]": np.s_[2:4],
}.items():
    try:
        found = part[index].tolist()
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[-48:]}"
    print(f"{name}: numpy {array[index].tolist()}, safetensors {found}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
