#!/bin/sh
# In JAX 5 // 0 is -2 and 0 // 0 is -1.
#
# Expected: an integer divided by zero gives 0, as in NumPy (there with a warning), or else -1 for every
#   number, as `jax.lax.div` gives.
# What happens: neither. `//` takes the -1 of `lax.div` for a quotient rounded towards zero whose
#   remainder has another sign than the divisor, and subtracts 1 unless x is 0. `%` has a test of
#   its own and gives 0 as NumPy does, where `lax.rem` gives x. Unsigned, x // 0 is the largest value.
# Version: jax 0.10.2, on the CPU.
# Decided in: jax/_src/numpy/ufuncs.py, floor_divide (subtracts 1 from the result of `lax.div`) and
#   remainder (puts 0 where the divisor is 0).
#
# Output:
#   5: numpy // 0, % 0; jax.numpy // -2, % 0; lax div -1, rem 5
#   0: numpy // 0, % 0; jax.numpy // -1, % 0; lax div -1, rem 0
#   -5: numpy // 0, % 0; jax.numpy // -2, % 0; lax div -1, rem -5
#   5 unsigned: jax.numpy // 4294967295
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 numpy==2.4.6 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

zero = jnp.int32(0)
np.seterr(all="ignore")
for number in (5, 0, -5):
    x = jnp.int32(number)
    print(
        f"{number}: numpy // {np.int32(number) // np.int32(0)}, % {np.int32(number) % np.int32(0)};"
        f" jax.numpy // {x // zero}, % {x % zero}; lax div {jax.lax.div(x, zero)},"
        f" rem {jax.lax.rem(x, zero)}"
    )
print(f"5 unsigned: jax.numpy // {jnp.uint32(5) // jnp.uint32(0)}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
