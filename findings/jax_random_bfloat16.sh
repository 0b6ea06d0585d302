#!/bin/sh
# Random numbers of jax.random in bfloat16 take 128 values, and the normal ones end at 2.9.
#
# Expected: `normal` with dtype bfloat16 gives what float32 rounded to bfloat16 gives: thousands of
#   values and, among a million, some beyond 4.
# What happens: a number is made of as many random bits as the mantissa has, 7 for bfloat16. `uniform`
#   knows multiples of 1/128 only, and `normal` and `exponential` are computed from such numbers: they
#   have no tails, and the normal ones reach further down than up. Weights and noise that are drawn
#   in the dtype of a bfloat16 model have this.
# Version: jax 0.10.2, on the CPU.
# Decided in: jax/_src/random/core.py, _uniform (as many bits as the mantissa has), which _normal_real
#   and _exponential call with the dtype of the result.
#
# Output:
#   drawn as float32, rounded to bfloat16:
#     uniform: 1717 values, 0.00 to 1.00
#     normal: 3598 values, -4.66 to 4.53
#     exponential: 2158 values, 0.00 to 12.69
#   drawn as bfloat16, rounded to bfloat16:
#     uniform: 128 values, 0.00 to 0.99
#     normal: 128 values, -2.89 to 2.52
#     exponential: 128 values, 0.00 to 4.84
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import jax
import jax.numpy as jnp

key = jax.random.key(0)
shape = (1_000_000,)
for dtype in (jnp.float32, jnp.bfloat16):
    print(f"drawn as {dtype.__name__}, rounded to bfloat16:")
    for draw in (jax.random.uniform, jax.random.normal, jax.random.exponential):
        numbers = draw(key, shape, dtype).astype(jnp.bfloat16)
        values = len(jnp.unique(numbers))
        print(f"  {draw.__name__}: {values} values, {numbers.min():.2f} to {numbers.max():.2f}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
