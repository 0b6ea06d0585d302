"""Tests of the mLSTM by decayed attention, computed in XLA with the roundings of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import (
    mosaic,
    mosaic_testing,
    segments,
    testing,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    decayed_attention_xla,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import mLSTMBackendFwbwConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments

CONFIG = mLSTMBackendFwbwConfig(stabilize_correctly=True, return_state=True)


@jax.jit
def twin(arguments, reset=None):
    return mosaic.mlstm_mosaic(
        MLSTMArguments(*arguments), reset, CONFIG, None, decayed_attention_xla
    )


def random_arguments(seed, leading, time, qk_dim=24, v_dim=40, dtype=jnp.bfloat16):
    drawn = testing.random_arguments(seed, leading, time, qk_dim=qk_dim, v_dim=v_dim)
    return drawn._replace(**{x: jnp.asarray(getattr(drawn, x), dtype) for x in "qkv"})


@pytest.mark.parametrize("stabilize_correctly", [True, False])
@pytest.mark.parametrize(("time", "dims"), [(1, (64, 128)), (65, (40, 72)), (200, (64, 128))])
def test_outputs_states_and_gradients(time, dims, stabilize_correctly):
    problem = mosaic_testing.problem(time, *dims, stabilize_correctly)
    actual = mosaic_testing.solve(problem, "twin", stabilize_correctly=stabilize_correctly)
    mosaic_testing.assert_close(problem, actual, problem.expected, 5e-3, 1e-2)


def test_recomputed_states_equal_the_kept_ones():
    problem = mosaic_testing.problem(65, 40, 72)
    kept, recomputed = (mosaic_testing.solve(problem, "twin", keep_c=x) for x in (True, False))
    for x, y in zip(kept, recomputed, strict=True):
        assert testing.relative_error(x, y, 1e-6) < 1e-5


def test_segments_change_nothing_but_roundings(monkeypatch):
    monkeypatch.setattr(segments, "_LEAST_CHUNKS", 2)
    arguments = random_arguments(5, (1, 3), 512)
    reset = np.random.default_rng(5).random((1, 3, 512)) < 0.01
    cotangents = testing.random_cotangents(6, arguments)
    cotangents = jnp.bfloat16(cotangents[0]), cotangents[1]

    def run(multiprocessors):
        """Returns the results, and the numbers of segments of the passes."""
        monkeypatch.setattr(segments, "_MULTIPROCESSORS", multiprocessors)
        numbers = set()

        def attend(inputs, options):
            numbers.add(options.segments)
            return decayed_attention_xla(inputs, options)

        def cell(arguments, reset):
            return mosaic.mlstm_mosaic(MLSTMArguments(*arguments), reset, CONFIG, attend=attend)

        return testing.outputs_and_gradients(cell, arguments, reset, cotangents), numbers

    whole, numbers = run(1)
    assert numbers == {1}
    segmented, numbers = run(132)
    assert max(numbers) == 4
    for x, y in zip(jax.tree.leaves(segmented), jax.tree.leaves(whole), strict=True):
        assert testing.relative_error(x, y, 1e-3) < 5e-3


def test_leading_axes_are_sequences_and_heads():
    arguments = random_arguments(0, (2, 3), 70)
    h, state = twin(arguments)
    flat = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), arguments)
    one = jax.tree.map(lambda x: x[0, 1], arguments)
    for other, at in ((flat, 1), (one, ())):
        other_h, other_state = twin(other)
        expected = jax.tree.map(lambda x: x[0, 1], (h, state))
        actual = jax.tree.map(lambda x, at=at: x[at], (other_h, other_state))
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-2, atol=1e-5)


def test_the_state_continues_a_sequence():
    arguments = random_arguments(1, (1, 2), 150)
    tokens, state = arguments[:5], arguments[5:]
    whole, last = twin(arguments)
    first = [x[:, :, :70] for x in tokens]
    h1, state = twin((*first, *state))
    h2, state = twin((*(x[:, :, 70:] for x in tokens), *state))
    assert testing.relative_error(jnp.concatenate([h1, h2], axis=2), whole) < 5e-3
    for x, y in zip(state, last, strict=True):
        assert testing.relative_error(x, y) < 5e-3


def test_results_have_the_types_of_the_arguments():
    arguments = random_arguments(2, (1, 1), 10, dtype=jnp.float16)
    h, vjp = jax.vjp(lambda *x: twin(x)[0], *arguments)
    assert h.dtype == jnp.float16
    assert [dx.dtype for dx in vjp(h)] == [x.dtype for x in arguments]


def test_every_device_computes_its_part_in_shard_map():
    arguments = random_arguments(3, (2, 2), 70)
    reset = np.zeros((2, 1, 70), bool)
    reset[:, :, 33] = True

    def loss(arguments, reset):
        h, state = twin(arguments, jnp.broadcast_to(reset, arguments.i.shape))
        return jnp.sum(h.astype(jnp.float32) ** 2) + jnp.sum(state.C**2)

    grads = jax.jit(jax.grad(loss))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = PartitionSpec("x")
    sharded = jax.shard_map(grads, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    actual, expected = jax.jit(sharded)(arguments, reset), grads(arguments, reset)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert testing.relative_error(x, y, 1e-6) < 5e-3


def test_an_incomplete_state_is_an_error():
    arguments = random_arguments(4, (1, 1), 10)._replace(n=None)
    with pytest.raises(ValueError, match="the initial state is incomplete"):
        twin(arguments)
