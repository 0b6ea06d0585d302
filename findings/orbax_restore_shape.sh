#!/bin/sh
# Orbax restores into a target of another shape, without an error, unless it is a JAX array.
#
# Expected: `restore` with a target raises if an array has another shape in the checkpoint; `strict`,
#   on by default, is documented to raise rather than to cut or pad.
# What happens: this is so for JAX arrays (and structs with a sharding). A NumPy array or a struct
#   without a sharding gets what is in the checkpoint in its own shape, while the dtype is taken
#   from the target: shapes are not compared, and fractions are cut off.
# Version: orbax-checkpoint 0.12.8.
# Decided in: orbax/checkpoint/checkpoint_utils.py, construct_restore_args (a shape only for JAX arrays);
#   orbax/checkpoint/_src/serialization/type_handlers.py, NumpyHandler.deserialize.
#
# Output:
#   into a JAX array of shape (2,): ValueError
#   into a NumPy array of shape (2,): float32 [[1.0, 2.0, 3.5]]
#   into a struct of shape (2,): float32 [[1.0, 2.0, 3.5]]
#   into a struct of shape (9, 9) and int8: int8 [[1, 2, 3]]
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import logging
import os

import jax
import numpy as np
from orbax.checkpoint import StandardCheckpointer

logging.disable(logging.CRITICAL)
path = os.path.abspath("checkpoint")
with StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"w": np.array([[1, 2, 3.5]], np.float32)})


def show(name, target):
    with StandardCheckpointer() as checkpointer:
        try:
            w = checkpointer.restore(path, {"w": target}, strict=True)["w"]
            print(f"into {name}: {w.dtype} {w.tolist()}")
        except ValueError as error:
            print(f"into {name}: {type(error).__name__}")


show("a JAX array of shape (2,)", jax.numpy.zeros(2))
show("a NumPy array of shape (2,)", np.zeros(2, np.float32))
show("a struct of shape (2,)", jax.ShapeDtypeStruct((2,), np.float32))
show("a struct of shape (9, 9) and int8", jax.ShapeDtypeStruct((9, 9), np.int8))
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
