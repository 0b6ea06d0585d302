"""Tests of the kernels: in Pallas's interpreter, which jax has since 0.12, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import mosaic_testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import Inputs, Options
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import choose_tiling
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import interpreted_kernels
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import mlstm_mosaic
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic_testing import has_interpreter

CONFIG = mLSTMBackendFwbwConfig(stabilize_correctly=True, keep_c=True)
needs_interpreter = pytest.mark.skipif(
    not has_interpreter(), reason="needs the interpreter of jax 0.12"
)


@needs_interpreter
@pytest.mark.parametrize(
    ("time", "dims", "stabilize_correctly"), [(65, (40, 72), False), (130, (64, 128), True)]
)
def test_interpreted_kernels_compute_the_mlstm(time, dims, stabilize_correctly):
    mosaic_testing.assert_kernels_solve(time, *dims, stabilize_correctly)


@needs_interpreter
def test_the_backend_takes_the_kernels_where_it_is_told():
    x = jnp.ones((1, 2, 3, 8), jnp.bfloat16)
    arguments = x, x, x, x[..., 0], x[..., 0]
    config = mLSTMBackendFwbwConfig(stabilize_correctly=True, implementation="mosaic")
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        mlstm_fwbw_custom_grad(config)(*arguments)
    with interpreted_kernels():
        program = jax.make_jaxpr(mlstm_fwbw_custom_grad(config))(*arguments)
    assert "mlstm_mosaic" in str(program)


def _block(x, weights, reset):
    """A layer around the cell, with two heads of 64 features."""
    y = (x @ weights).reshape(*x.shape[:2], -1, 64).swapaxes(1, 2)
    gate = y[..., 0].astype(jnp.float32)
    h = mlstm_mosaic(MLSTMArguments(y, y, y, gate, gate + 3), reset[:, None], CONFIG)
    return x + h.swapaxes(1, 2).reshape(x.shape)


def _loss(x, weights, reset):
    def body(x, weights):
        return jax.checkpoint(_block)(x, weights, reset), None

    return jnp.sum(jax.lax.scan(body, x, weights)[0].astype(jnp.float32))


def test_a_training_step_of_blocks_on_a_mesh_lowers_for_cuda():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    batch, everywhere = PartitionSpec("x"), PartitionSpec()

    def grads(x, weights, reset):
        weights = jax.lax.pcast(weights, "x", to="varying")
        return jax.lax.psum(jax.grad(_loss, argnums=1)(x, weights, reset), "x")

    step = jax.shard_map(
        grads, mesh=mesh, in_specs=(batch, everywhere, batch), out_specs=everywhere
    )
    shapes = ((2, 130, 128), jnp.bfloat16), ((3, 128, 128), jnp.bfloat16), ((2, 130), bool)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # The forward pass, once more with remat, and dv, dq and dk, in the body of a scan each.
    kernels = [line for line in text.splitlines() if "stablehlo.custom_call @mosaic_gpu" in line]
    assert len(kernels) == 5
    # Only the second forward pass writes states, before the chunks 0 and 2 of two heads.
    assert sum("tensor<4x64x64xbf16>" in line.rpartition("->")[2] for line in kernels) == 1


def test_a_training_step_on_parts_of_sequences_lowers_for_cuda():
    def block(x, weights):
        y = (x @ weights).reshape(*x.shape[:2], -1, 64).swapaxes(1, 2)
        gate = y[..., 0].astype(jnp.float32)
        h = mlstm_mosaic(MLSTMArguments(y, y, y, gate, gate + 3), None, CONFIG, "cp")
        return x + h.swapaxes(1, 2).reshape(x.shape), None

    def loss(x, weights):
        return jnp.sum(jax.lax.scan(jax.checkpoint(block), x, weights)[0].astype(jnp.float32))

    tokens, everywhere = PartitionSpec(None, "cp"), PartitionSpec()
    step = jax.shard_map(
        jax.grad(loss, argnums=1),
        mesh=AbstractMesh((8,), ("cp",), (AxisType.Auto,)),
        in_specs=(tokens, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    shapes = (2, 8 * 130, 128), (3, 128, 128)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # In addition, states alone before each forward pass, and before the other backward passes.
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 5 + 3
    # Between eight parts, four steps for each forward pass, for dC and for dn.
    assert text.count("stablehlo.collective_permute") == 4 * 4


def test_the_passes_of_a_single_chunk_lower_for_cuda():
    """A loop over one chunk is inlined, which jax 0.12 could not lower for minutes."""
    config = mLSTMBackendFwbwConfig(stabilize_correctly=True, keep_c=False)

    def loss(x, gate):
        h = mlstm_mosaic(MLSTMArguments(x, x, x, gate, gate), None, config)
        return jnp.sum(h.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, 2, 10, 64), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, 2, 10), jnp.float32)
    traced = jax.jit(jax.grad(loss)).trace(x, gate)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 5


def _pass(heads: int, qk_dim: int, v_dim: int) -> Inputs:
    """Returns the shapes of a pass over two chunks."""
    q, v = (jax.ShapeDtypeStruct((1, 128, heads * x), jnp.bfloat16) for x in (qk_dim, v_dim))
    gates = jax.ShapeDtypeStruct((heads, 2, 8, 64), jnp.float32)
    return Inputs(q, q, v, gates, jax.ShapeDtypeStruct((heads, 2), jnp.float32))


def test_heads_of_the_7b_model_get_wide_tiles_and_two_stages():
    tiling = choose_tiling(_pass(2, 256, 512), Options())
    assert (tiling.width, tiling.a_stages, tiling.x_stages) == (64, 2, 2)


def test_heads_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="heads of 1024 and 128 features do not fit.*=xla"):
        choose_tiling(_pass(1, 1024, 128), Options())
