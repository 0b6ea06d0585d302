#!/bin/sh
# On the CPU, a product of float32 with the algorithm BF16_BF16_F32 does not round to bfloat16.
#
# Expected: DotAlgorithmPreset names the types of the factors and of the sum, and what a platform
#   cannot do is an error. So BF16_BF16_F32 has the error of bfloat16, 2e-3, and a test on a CPU
#   tells what the algorithm costs in accuracy on a GPU or TPU.
# What happens: BF16_BF16_F32 and its variants X3 and X6 are accepted and computed in float32, all
#   three with the same bits. F16_F16_F16, accepted as well, does round. Those that only a GPU has,
#   TF32_TF32_F32 and BF16_BF16_F32_X9, are errors.
# Version: jax 0.10.2 and 0.12.0.1 (Python 3.12) on the CPU; the script runs 0.10.2.
# Decided in: jax/_src/lax/lax.py, _handle_dot_precision, whose list of what a CPU supports has these
#   names; XLA for CPUs ignores the algorithm of a product.
#
# Output:
#   error, compared with float64
#   rounded to bfloat16: 2e-03
#   BF16_BF16_F32: 3e-07
#   BF16_BF16_F32_X3: 3e-07, as BF16_BF16_F32
#   BF16_BF16_F32_X6: 3e-07, as BF16_BF16_F32
#   F16_F16_F16: 4e-04
#   BF16_BF16_F32_X9: ValueError
#   TF32_TF32_F32: ValueError
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
import numpy as np
from jax.lax import DotAlgorithmPreset

rng = np.random.default_rng(0)
a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
exact = np.float64(a) @ np.float64(b)


def error(y):
    return f"{np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact):.0e}"


print("error, compared with float64")
rounded = [np.asarray(jnp.bfloat16(x), np.float32) for x in (a, b)]
print("rounded to bfloat16:", error(rounded[0] @ rounded[1]))
first = None
for name in ("F32", "F32_X3", "F32_X6"):
    algorithm = DotAlgorithmPreset[f"BF16_BF16_{name}"]
    y = np.asarray(jax.jit(lambda a, b: jax.lax.dot(a, b, precision=algorithm))(a, b))
    first = y if first is None else first
    same = ", as BF16_BF16_F32" if y is not first and np.array_equal(y, first) else ""
    print(f"{algorithm.name}: {error(y)}{same}")
for name in ("F16_F16_F16", "BF16_BF16_F32_X9", "TF32_TF32_F32"):
    try:
        y = jax.lax.dot(a, b, precision=DotAlgorithmPreset[name])
        print(f"{name}: {error(y)}")
    except ValueError:
        print(f"{name}: ValueError")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
