#!/bin/sh
# A checkpoint of Orbax in a folder named "run[1]" is saved and cannot be restored.
#
# Expected: the name of a folder is a name, and a checkpoint that was saved without an error can be
#   restored. A glob gives what pathlib gives: the pattern is matched below the folder.
# What happens: etils joins folder and pattern and matches the whole, so `[1]` stands for 1. Orbax looks
#   in this way for the files of each process, finds none, leaves out the index of all arrays with no
#   more than a warning, and finishes the checkpoint. A folder with `**` in its name raises while
#   saving, and one with `*` finds what lies in others, too.
# Version: orbax-checkpoint 0.12.8 with etils 1.15.0.
# Decided in: etils/epath/gpath.py, _GPath.glob (joins without escaping);
#   orbax/checkpoint/_src/serialization/ocdbt_utils.py, merge_ocdbt_per_process_files (warns).
#
# Output:
#   run: saved and restored
#   run*: saved and restored
#   run[1]: saved, then ValueError
#   run**: nothing, then NotImplementedError
#   pathlib, 'check*' in run: ['run/checkpoint']
#   etils.epath, 'check*' in run: ['run/checkpoint']
#   pathlib, 'check*' in run[1]: ['run[1]/checkpoint']
#   etils.epath, 'check*' in run[1]: []
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 etils==1.15.0 jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import logging
import os
import pathlib

import numpy as np
from etils import epath
from orbax.checkpoint import StandardCheckpointer

logging.disable(logging.CRITICAL)
for name in ("run", "run*", "run[1]", "run**"):
    path = os.path.abspath(f"{name}/checkpoint")
    done = "nothing"
    with StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(path, {"w": np.arange(4)})
            checkpointer.wait_until_finished()
            done = "saved"
            checkpointer.restore(path)
            done = "saved and restored"
        except (ValueError, NotImplementedError) as error:
            done += f", then {type(error).__name__}"
    print(f"{name}: {done}")
for name in ("run", "run[1]"):
    for library in (pathlib, epath):
        found = [str(x) for x in library.Path(name).glob("check*")]
        print(f"{library.__name__}, 'check*' in {name}: {sorted(found)}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
