#!/bin/sh
# Pallas Mosaic GPU takes two loads of the same shared memory in two layouts for one value.
#
# Expected: a kernel for a GPU may load a vector once along the rows of a tile and once along its columns,
#   as any outer product of a vector with itself does. Each load names its layout.
# What happens: a load with a layout is a load without one, and a cast to the layout. Before layouts are
#   inferred, the common subexpressions of the kernel are merged, and so the two loads become one value
#   with two casts that contradict each other. Lowering fails, with a message that blames the casts. The
#   same kernel lowers with lane semantics, the default until jax 0.10, where no layouts are inferred. An
#   index that the compiler cannot know to be the same keeps the loads apart.
# Version: jax 0.12.0.1; lowered for CUDA, which needs no GPU.
# Decided in: jax/experimental/mosaic/gpu/core.py, lower_mgpu_module ("canonicalize,cse" before
#   infer_layout), and jax/_src/pallas/mosaic_gpu/primitives.py, load.
#
# Output:
#   Warpgroup semantics, rows 0 and 1: lowered
#   Warpgroup semantics, rows 0 and 0: ValueError: Failed to infer a possible set of layouts.
#   Lane semantics, rows 0 and 1: lowered
#   Lane semantics, rows 0 and 0: lowered
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
# jax 0.12 needs Python 3.12.
for python in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
  "$python" -m venv venv 2>/dev/null && break
done
venv/bin/pip install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = plgpu.Layout.WGMMA
ALONG_ROWS, ALONG_COLUMNS = TILE.reduce(1), TILE.reduce(0)


def lower(semantics, first, second):
    def kernel(x, out, shared, barrier):
        plgpu.copy_gmem_to_smem(x, shared, barrier)
        plgpu.barrier_wait(barrier)
        column = plgpu.load(shared.at[first], layout=ALONG_ROWS)
        row = plgpu.load(shared.at[second], layout=ALONG_COLUMNS)
        out[...] = lax.broadcast_in_dim(column, (64, 64), [0]) + lax.broadcast_in_dim(
            row, (64, 64), [1]
        )

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((2, 64), jnp.float32), plgpu.Barrier()],
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
    )
    x = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))


for semantics in (plgpu.LoweringSemantics.Warpgroup, plgpu.LoweringSemantics.Lane):
    for rows in ((0, 1), (0, 0)):
        try:
            lower(semantics, *rows)
            found = "lowered"
        except ValueError as error:
            found = f"ValueError: {str(error).split('.')[0]}."
        print(f"{semantics.name} semantics, rows {rows[0]} and {rows[1]}: {found}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
