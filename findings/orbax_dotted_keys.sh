#!/bin/sh
# Orbax stores {"a.b": x} and {"a": {"b": y}} under one name, and one of them is lost.
#
# Expected: what is saved comes back. A key may have any characters: one with a slash is kept apart
#   from a nested key, and so is one with a dot.
# What happens: the name of an array is the keys on its path joined by dots. Two arrays of one
#   shape that get the same name are written to the same place without an error, and both are
#   restored as one of them.
# Version: orbax-checkpoint 0.12.8.
# Decided in: orbax/checkpoint/_src/tree/utils.py, param_name_from_keypath (joins without escaping).
#
# Output:
#   {'a.b': array([1, 2])}: comes back
#   {'a/b': array([1, 2]), 'a': {'b': array([3, 4])}}: comes back
#   {'a.b': array([1, 2]), 'a': {'b': array([3, 4])}}: only 1 comes back
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
x, y = np.array([1, 2]), np.array([3, 4])
states = {"a.b": x}, {"a/b": x, "a": {"b": y}}, {"a.b": x, "a": {"b": y}}
for i, state in enumerate(states):
    path = os.path.abspath(f"checkpoint {i}")
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(path)
    same = jax.tree.all(jax.tree.map(np.array_equal, state, found))
    values = {str(array) for array in jax.tree.leaves(found)}
    print(f"{state}: {'comes back' if same else f'only {len(values)} comes back'}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
