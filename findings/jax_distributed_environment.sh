#!/bin/sh
# JAX reads the coordinator's address from the environment, but neither the number of processes nor
# the index of this one.
#
# Expected: `jax.distributed.initialize()` starts from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
#   JAX_PROCESS_ID, as launchers set them that JAX does not know.
# What happens: it takes the address, and then asks for the number as if nothing were set. A program
#   has to read the other two variables itself.
# Version: jax 0.10.2 (0.12.0 does the same).
# Decided in: jax/_src/distributed.py, State.initialize (reads JAX_COORDINATOR_ADDRESS alone).
#
# Output:
#   address alone: Number of processes must be defined.
#   all three: Number of processes must be defined.
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import sys

import jax

try:
    jax.distributed.initialize()
except ValueError as error:
    print(f"{sys.argv[1]}: {error}")
PYTHON
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:12345
{
  venv/bin/python finding.py "address alone"
  JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0 venv/bin/python finding.py "all three"
} 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
