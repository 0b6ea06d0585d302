"""Tests of the convolution over tokens that are sharded in contiguous parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.models.shared.convolution import CausalConvolution

PARTS, T, C, W = 4, 16, 3, 4
SEAM = T // PARTS
# Tokens before which the inputs are dropped, in each sequence.
RESETS = [(), (0,), (SEAM,), (SEAM - 1,), (SEAM + 1,), (SEAM - 2, 2 * SEAM), (1, 6, 7, 8, 15)]
RESET = np.stack([np.isin(np.arange(T), starts) for starts in RESETS])
B = len(RESETS)
RNG = np.random.default_rng(0)
X, STATE = (RNG.standard_normal((B, time, C), np.float32) for time in (T, W - 1))
D_Y, D_LAST = (RNG.standard_normal(x.shape, np.float32) for x in (X, STATE))
PARAMS = {
    "kernel": RNG.standard_normal((W, 1, C), np.float32),
    "bias": RNG.standard_normal(C, np.float32),
}


def convolve(params, x, state, reset):
    """Returns the output and the last inputs."""
    module = CausalConvolution(W, context_axis="cp")
    return module.apply({"params": params}, x, reset, state=state)


def with_gradients(function, reset, state):
    """Returns the outputs, and the gradients of the parameters, the inputs and the state."""

    @jax.jit
    def run(*arguments):
        outputs, vjp = jax.vjp(lambda *x: function(*x, reset), *arguments)
        return outputs, vjp((D_Y, None if state is None else D_LAST))

    return run(PARAMS, X, state)


def in_parts(num_parts):
    tokens, everywhere = PartitionSpec(None, "cp"), PartitionSpec()
    return jax.shard_map(
        convolve,
        mesh=Mesh(jax.devices()[:num_parts], "cp"),
        in_specs=(everywhere, tokens, everywhere, tokens),
        out_specs=(tokens, everywhere),
        check_vma=False,
    )


@pytest.mark.parametrize("reset", [None, RESET])
@pytest.mark.parametrize("state", [None, STATE])
def test_parts_are_the_whole(reset, state):
    expected = with_gradients(convolve, reset, state)
    actual = with_gradients(in_parts(PARTS), reset, state)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_part_shorter_than_what_a_token_reads_is_an_error():
    x = jax.ShapeDtypeStruct((B, 2 * PARTS, C), jnp.float32)
    with pytest.raises(ValueError, match="2 tokens, fewer than the 3 .* of width 4"):
        jax.eval_shape(in_parts(PARTS), PARAMS, x, None, None)
