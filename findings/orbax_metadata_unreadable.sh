#!/bin/sh
# The metadata of a damaged or missing checkpoint of Orbax is None, as if it had none.
#
# Expected: `metadata` of a folder that does not exist, or of a checkpoint whose files are damaged,
#   raises, as `restore` does.
# What happens: it logs a warning and returns an object whose `item_metadata` is None. Code that asks
#   for the arrays of a checkpoint cannot tell a wrong path or a lost file from a checkpoint of which
#   nothing is known.
# Version: orbax-checkpoint 0.12.8.
# Decided in: orbax/checkpoint/_src/checkpointers/checkpointer.py, Checkpointer.metadata (catches four
#   kinds of errors).
#
# Output:
#   whole: ['w']
#   index of the arrays moved away: None
#   put back: ['w']
#   _METADATA cut off: None
#   folder removed: None
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
import pathlib
import shutil

import numpy as np
from orbax.checkpoint import StandardCheckpointer

logging.disable(logging.CRITICAL)
path = os.path.abspath("checkpoint")


def show(name):
    with StandardCheckpointer() as checkpointer:
        arrays = checkpointer.metadata(path).item_metadata
        print(f"{name}: {arrays if arrays is None else list(arrays)}")


with StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"w": np.arange(4)})
show("whole")
(index,) = pathlib.Path(path, "d").iterdir()
index.rename("index")
show("index of the arrays moved away")
pathlib.Path("index").rename(index)
show("put back")
pathlib.Path(path, "_METADATA").write_text("{")
show("_METADATA cut off")
shutil.rmtree(path)
show("folder removed")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
