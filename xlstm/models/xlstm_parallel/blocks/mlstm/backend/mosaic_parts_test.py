"""Tests of the kernels' path on sequences in parts, computed in XLA as in `mosaic_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.distributed.hlo_collectives import find_collectives
from xlstm.models.xlstm_parallel.blocks.mlstm.backend import mosaic_testing, segments, testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    decayed_attention_xla,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import mLSTMBackendFwbwConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import mlstm_mosaic
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.sequence_parts import INCOMING_STATE


@pytest.mark.parametrize(
    ("num_parts", "time", "dims", "stabilize_correctly", "keep_c"),
    [
        (2, 130, (40, 72), True, False),
        (4, 280, (64, 128), True, True),
        (8, 8, (64, 64), False, True),
    ],
)
def test_outputs_states_and_gradients(num_parts, time, dims, stabilize_correctly, keep_c):
    problem = mosaic_testing.problem(time, *dims, stabilize_correctly)
    options = {"stabilize_correctly": stabilize_correctly, "keep_c": keep_c}
    actual = mosaic_testing.solve(problem, "twin", num_parts, **options)
    mosaic_testing.assert_close(problem, actual, problem.expected, 5e-3, 1e-2)
    whole = mosaic_testing.solve(problem, "twin", **options)
    fwbw = mosaic_testing.solve(problem, "fwbw", num_parts, **options)
    mask = problem.is_well_conditioned
    # The gradients of `fwbw` in bfloat16 have larger errors of their own.
    for expected in (whole, fwbw[:4]):
        for at, (x, y) in enumerate(zip(actual, expected, strict=False)):
            x, y = (np.asarray(z)[mask] if at == 0 else z for z in (x, y))
            assert testing.relative_error(x, y, 1e-6) < 5e-3


def test_parts_in_segments(monkeypatch):
    problem = mosaic_testing.problem(512, 8, 8)
    results = []
    for multiprocessors in (1, 132):
        monkeypatch.setattr(segments, "_LEAST_CHUNKS", 2)
        monkeypatch.setattr(segments, "_MULTIPROCESSORS", multiprocessors)
        results.append(mosaic_testing.solve(problem, "twin", 2))
    for x, y in zip(*results, strict=True):
        assert testing.relative_error(x, y, 1e-3) < 5e-3
    mosaic_testing.assert_close(problem, results[1], problem.expected, 5e-3, 1e-2)


def _layers(policy):
    """Returns the gradients of two layers over four parts, and their messages in a layer."""
    mesh = Mesh(jax.devices()[:4], "cp")
    config = mLSTMBackendFwbwConfig(stabilize_correctly=True, keep_c=True)
    arguments = testing.random_arguments(0, (1, 2), 24, v_dim=4, with_state=False)
    x, *others = (jnp.asarray(x, jnp.bfloat16) for x in arguments[:3])
    layers = jax.tree.map(lambda x: np.stack([x, x]), (*others, *arguments[3:5]))

    def layer(x, arguments):
        arguments = MLSTMArguments(x, *arguments)
        return x + mlstm_mosaic(arguments, None, config, "cp", decayed_attention_xla), None

    def gradients(x, layers):
        def loss(x, layers):
            step = layer if policy is None else jax.checkpoint(layer, policy=policy)
            return jnp.sum(jnp.sin(jax.lax.scan(step, x, layers)[0].astype(jnp.float32)))

        return jax.grad(loss, (0, 1))(x, layers)

    tokens, of_layers = PartitionSpec(None, None, "cp"), PartitionSpec(None, None, None, "cp")
    specs = (tokens, of_layers)
    run = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    compiled = jax.jit(run).lower(x, layers).compile()
    messages = sum(x.loops == (2,) for x in find_collectives(compiled.as_text(), mesh))
    return compiled(x, layers), messages


def test_a_policy_of_remat_spares_the_messages_of_the_forward_pass():
    policies = jax.checkpoint_policies
    expected, messages = _layers(None)
    assert messages == 3 * 3  # Forward, backward for C and for n; three steps each.
    recomputed, messages = _layers(policies.nothing_saveable)
    assert messages == 4 * 3
    saved, messages = _layers(policies.save_only_these_names(INCOMING_STATE))
    assert messages == 3 * 3
    for actual in (recomputed, saved):
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert testing.relative_error(x, y, 1e-3) < 5e-3
