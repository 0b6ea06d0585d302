#!/bin/sh
# On the CPU, collectives that only move bfloat16 or 8-bit floats send a type of twice the bytes.
#
# Expected: a gather, a permutation or an exchange computes nothing, so it sends the type that it is
#   given, and the compiled program of a mesh of simulated devices tells how many bytes a mesh of
#   accelerators sends. Only sums might be computed in a wider type.
# What happens: XLA widens before every collective and rounds after it, sums or not: bfloat16
#   becomes float32, and an 8-bit float becomes float16. float16 itself and integers are sent as they
#   are. So the bytes of a bfloat16 program are counted twice, and those of a float16 one are right.
# Version: jax 0.10.2 and 0.12.0.1 (Python 3.12) on the CPU; the script runs 0.10.2.
# Decided in: XLA's compiler for CPUs, whose float normalization replaces types that the CPU's
#   collectives are not listed to support.
#
# Output:
#   bfloat16: all_gather f32, ppermute f32, all_to_all f32, psum f32
#   float16: all_gather f16, ppermute f16, all_to_all f16, psum f16
#   float8_e4m3fn: all_gather f16, ppermute f16, all_to_all f16, psum f16
#   int8: all_gather s8, ppermute s8, all_to_all s8, psum s8
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,))
collectives = {
    "all_gather": lambda x: lax.all_gather(x, "x", tiled=True),
    "ppermute": lambda x: lax.ppermute(x, "x", [(0, 1), (1, 0)]),
    "all_to_all": lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True),
    "psum": lambda x: lax.psum(x, "x"),
}
for dtype in ("bfloat16", "float16", "float8_e4m3fn", "int8"):
    x, found = jnp.ones((8,), dtype), []
    for name, fn in collectives.items():
        step = jax.shard_map(fn, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
        program = jax.jit(step).lower(x).compile().as_text()
        kinds = "all-gather|collective-permute|all-to-all|all-reduce"
        sent = re.search(rf"= \(?(\w+)\[[^=]* (?:{kinds})(?:-start)?\(", program)
        found.append(f"{name} {sent[1]}")
    print(f"{dtype}: {', '.join(found)}")
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 venv/bin/python finding.py |
  tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
