#!/bin/sh
# safetensors.numpy saves bfloat16, and of its two functions that load only one knows it.
#
# Expected: `load` is `load_file` for bytes, and what `save` returns it reads.
# What happens: `save` and `save_file` take bfloat16 and 8-bit floats of ml_dtypes. `load_file` reads
#   bfloat16; `load` has a table of dtypes of its own, without it, and raises KeyError. float8_e4m3fn,
#   which is saved as well, is read by neither.
# Version: safetensors 0.8.0 with numpy 2.4.6 and ml_dtypes 0.6.0.
# Decided in: safetensors/numpy.py, _getdtype (for `load`); bindings/python/src/lib.rs of safetensors,
#   get_pydtype (for `load_file`).
#
# Output:
#   float16: saved, load_file float16, load float16
#   bfloat16: saved, load_file bfloat16, load KeyError
#   float8_e4m3fn: saved, load_file AttributeError, load KeyError
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6 ml-dtypes==0.6.0 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import ml_dtypes
import numpy as np
from safetensors.numpy import load, load_file, save, save_file


def attempt(function, source):
    try:
        return function(source)["x"].dtype
    except (KeyError, AttributeError) as error:
        return type(error).__name__


for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    arrays = {"x": np.array([1.0, 2.0]).astype(dtype)}
    save_file(arrays, "x.safetensors")
    print(
        f"{dtype.__name__}: saved, load_file {attempt(load_file, 'x.safetensors')},"
        f" load {attempt(load, save(arrays))}"
    )
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
