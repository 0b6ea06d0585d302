"""Tests of the XLA program on sequences in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.distributed.hlo_collectives import find_collectives
from xlstm.models.xlstm_parallel.blocks.mlstm.backend import programs, testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import Device
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.sequence_parts import INCOMING_STATE

CHUNK_SIZE = 5
FINITE_GATES = [0.0, 1e-45, 1.0, 40.0, 80.0, 88.8, 104.0, 1e4, 1e9, 1e20, 1e28, 1e29, 1e30, 3e38]


@functools.cache
def cell_of(num_parts, stabilize_correctly=True, keeps=True):
    """Returns the function of whole sequences; one part is the program without parts."""
    options = dict.fromkeys(("keep_G", "keep_gates", "keep_M", "keep_c"), keeps)
    config = mLSTMBackendFwbwConfig(
        CHUNK_SIZE, return_state=True, stabilize_correctly=stabilize_correctly, **options
    )

    def cell(arguments, reset):
        axis = None if num_parts == 1 else "cp"
        h, state = mlstm_fwbw_custom_grad(config, None, axis)(*arguments, reset=reset)
        return h, tuple(state)

    return cell if num_parts == 1 else testing.in_parts(cell, num_parts)


@functools.cache
def recurrent_cell(stabilize_correctly):
    backend = create_backend(BackendConfig("recurrent", 0, stabilize_correctly))

    def cell(arguments, reset):
        h, state = backend.apply({}, *arguments, return_last_states=True, reset=reset)
        return h, tuple(state)

    return cell


@pytest.mark.parametrize(
    ("num_parts", "time", "stabilize_correctly", "keeps", "with_reset"),
    [
        (2, 64, True, False, False),
        (4, 64, False, True, True),
        (8, 64, True, True, False),
        (8, 64, True, True, True),
        (8, 8, True, False, False),
    ],
)
def test_outputs_states_and_gradients(num_parts, time, stabilize_correctly, keeps, with_reset):
    problem = testing.problem(time, with_reset=with_reset, stabilize_correctly=stabilize_correctly)
    cell = cell_of(num_parts, stabilize_correctly, keeps)
    reset = problem.reset if with_reset else None
    actual = testing.outputs_and_gradients(cell, problem.arguments, reset, problem.cotangents)
    testing.assert_solves(problem, *actual)


def resets_around_seams(time, num_parts):
    """Returns `reset (..., T)`, one row for each pattern."""
    part, last = time // num_parts, time - time // num_parts
    seams = range(part, time, part)
    rng = np.random.default_rng(0)
    starts = [(), (0,), (part,), (part - 1,), (part + 1,), (last,), (last - 1,), (last + 1,)]
    starts += [(time - 1,), (part - 1, part, part + 1, last), seams, range(time)]
    starts += [np.flatnonzero(rng.random(time) < density) for density in (0.04, 0.08, 0.3)]
    return np.stack([np.isin(np.arange(time), list(x)) for x in starts])


@pytest.mark.parametrize(
    ("num_parts", "time", "stabilize_correctly", "keeps"),
    [(2, 16, False, False), (4, 28, True, True), (8, 64, True, False)],
)
def test_parts_are_the_whole_in_double_precision(num_parts, time, stabilize_correctly, keeps):
    reset = resets_around_seams(time, num_parts)
    leading = (len(reset), 3)
    reset = np.broadcast_to(reset[:, None], (*leading, time))
    arguments = testing.random_arguments(num_parts, leading, time, fgate_bias=2.0)
    # Some states decay over a part and others do not; some gates are nearly shut.
    scales = np.array([1.0, 3.0, 12.0])[:, None]
    arguments = arguments._replace(i=arguments.i * scales, f=arguments.f * scales)
    cotangents = testing.random_cotangents(0, arguments)
    with jax.enable_x64(True):
        to_float64 = functools.partial(np.asarray, dtype=np.float64)
        arguments, cotangents = jax.tree.map(to_float64, (arguments, cotangents))
        actual, whole, recurrent = (
            testing.outputs_and_gradients(cell, arguments, reset, cotangents)
            for cell in (
                cell_of(num_parts, stabilize_correctly, keeps),
                cell_of(1, stabilize_correctly, keeps),
                recurrent_cell(stabilize_correctly),
            )
        )
        for expected in (whole, recurrent):
            for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                assert x.dtype == np.float64
                for row in range(len(reset)):
                    floor = 1e-9 + 1e-3 * np.linalg.norm(y) / len(reset)
                    assert testing.relative_error(x[row], y[row], floor) < 1e-9


def test_the_program_for_accelerators(monkeypatch):
    problem = testing.problem(64, with_reset=True)
    monkeypatch.setattr(programs, "current_device", lambda: Device("gpu", "NVIDIA A100"))
    actual = testing.outputs_and_gradients(
        cell_of.__wrapped__(4), problem.arguments, problem.reset, problem.cotangents
    )
    testing.assert_solves(problem, *actual)


def test_without_an_initial_state_and_without_the_last_one():
    arguments = testing.random_arguments(0, (2, 3), 24, with_state=False)
    reset = np.random.default_rng(0).random((2, 3, 24)) < 0.05
    dh, d_state = testing.random_cotangents(1, arguments)
    nothing = arguments._replace(C=None, n=None, m=None)
    config = mLSTMBackendFwbwConfig(CHUNK_SIZE, stabilize_correctly=True)

    def cell(arguments, reset):
        return mlstm_fwbw_custom_grad(config, None, "cp")(*arguments, reset=reset), ()

    (h, _), gradients = testing.outputs_and_gradients(
        testing.in_parts(cell, 4), nothing, reset, (dh, ())
    )
    zeros = jax.tree.map(np.zeros_like, d_state)
    (expected_h, _), expected = testing.outputs_and_gradients(
        cell_of(1), arguments, reset, (dh, zeros)
    )
    assert testing.relative_error(h, expected_h) < 3e-5
    assert gradients[5:] == (None, None, None)
    for x, y in zip(gradients[:5], expected[:5], strict=True):
        assert testing.relative_error(x, y) < 3e-5


def test_results_have_the_types_of_the_arguments():
    arguments = testing.random_arguments(0, (2, 3), 24)
    halves = {x: jnp.asarray(getattr(arguments, x), jnp.float16) for x in "qkv"}
    arguments = arguments._replace(**halves)
    dh, d_state = testing.random_cotangents(1, arguments)
    reset = np.zeros((2, 3, 24), bool)
    actual, expected = (
        testing.outputs_and_gradients(cell, arguments, reset, (jnp.float16(dh), d_state))
        for cell in (cell_of(4), cell_of(1))
    )
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert testing.relative_error(x, y) < 2e-3


def finite_gates(rng, shape):
    """Draws gates of all magnitudes; in every second sequence the same few again and again."""
    few = rng.choice(FINITE_GATES, (*shape[:-1], 3)) * rng.choice([1, -1], (*shape[:-1], 3))
    repeated = np.take_along_axis(few, rng.integers(0, 3, shape), axis=-1)
    others = rng.choice(FINITE_GATES, shape) * rng.uniform(-1, 1, shape)
    return np.float32(np.where(rng.random((*shape[:-1], 1)) < 0.5, repeated, others))


@pytest.mark.parametrize("stabilize_correctly", [False, True])
def test_all_finite_gates_have_finite_results(stabilize_correctly):
    """Sums of huge gates over parts are rounded otherwise than over chunks."""
    arguments = testing.random_arguments(0, (2000, 2), 24, qk_dim=2, v_dim=3)
    cotangents = testing.random_cotangents(1, arguments)
    rng = np.random.default_rng(2)
    i, f, m = (finite_gates(rng, arguments.i.shape) for _ in range(3))
    arguments = arguments._replace(i=i, f=f, m=np.clip(m[..., 0], -1e29, 1e29))
    reset = rng.random(arguments.i.shape) < 0.01
    results = testing.outputs_and_gradients(
        cell_of(2, stabilize_correctly, False), arguments, reset, cotangents
    )
    for x in jax.tree.leaves(results):
        assert np.all(np.isfinite(x))


def _layers(policy):
    """Returns the gradients of two layers over four parts, compiled, and their messages."""
    mesh = Mesh(jax.devices()[:4], "cp")
    config = mLSTMBackendFwbwConfig(CHUNK_SIZE, stabilize_correctly=True)
    arguments = testing.random_arguments(0, (1, 2), 24, v_dim=4, with_state=False)
    layers = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), arguments[1:5])

    def layer(x, arguments):
        return x + mlstm_fwbw_custom_grad(config, None, "cp")(x, *arguments), None

    def gradients(x, layers):
        def loss(x, layers):
            step = layer if policy is None else jax.checkpoint(layer, policy=policy)
            return jnp.sum(jnp.sin(jax.lax.scan(step, x, layers)[0]))

        return jax.grad(loss, (0, 1))(x, layers)

    tokens, of_layers = PartitionSpec(None, None, "cp"), PartitionSpec(None, None, None, "cp")
    specs = (tokens, of_layers)
    run = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    compiled = jax.jit(run).lower(arguments.q, layers).compile()
    messages = sum(x.loops == (2,) for x in find_collectives(compiled.as_text(), mesh))
    return compiled(arguments.q, layers), messages


def test_a_policy_of_remat_spares_the_messages_of_the_forward_pass():
    policies = jax.checkpoint_policies
    expected, messages = _layers(None)
    assert messages == 2 * 3  # Forward and backward; each is three steps between four parts.
    recomputed, messages = _layers(policies.nothing_saveable)
    assert messages == 3 * 3
    saved, messages = _layers(policies.save_only_these_names(INCOMING_STATE))
    assert messages == 2 * 3
    for actual in (recomputed, saved):
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_gradients_of_replicated_states_need_shard_map_without_its_check():
    arguments = testing.random_arguments(0, (1, 2), 4, with_state=False)
    tokens = PartitionSpec(None, None, "cp")
    run = jax.shard_map(
        mlstm_fwbw_custom_grad(mLSTMBackendFwbwConfig(), None, "cp"),
        mesh=Mesh(jax.devices()[:2], "cp"),
        in_specs=(tokens,) * 5,
        out_specs=tokens,
    )
    with pytest.raises(ValueError, match=r"sharded over cp need .*check_vma=False"):
        jax.eval_shape(run, *arguments[:5])


def test_a_sequence_in_one_part_has_the_program_of_a_whole_one():
    *arguments, _, _, _ = testing.random_arguments(0, (1, 2), 16, with_state=False)

    def program(context_axis, num_parts):
        cell = mlstm_fwbw_custom_grad(mLSTMBackendFwbwConfig(), None, context_axis)
        tokens = PartitionSpec(None, None, "cp")
        gradient = jax.shard_map(
            jax.grad(lambda *inputs: jnp.sum(cell(*inputs) ** 2), range(5)),
            mesh=Mesh(jax.devices()[:num_parts], "cp"),
            in_specs=tokens,
            out_specs=tokens,
            check_vma=False,
        )
        return jax.jit(gradient).lower(*arguments).as_text()

    assert program("cp", 1) == program(None, 1)
    assert program("cp", 2) != program(None, 2)


@pytest.mark.parametrize("name", ["recurrent", "parallel_stabilized"])
def test_other_backends_need_whole_sequences(name):
    arguments = testing.random_arguments(0, (1, 2), 4, with_state=False)
    backend = create_backend(BackendConfig(name), context_axis="cp")

    def cell(arguments, reset):
        h, state = backend.apply({}, *arguments, return_last_states=True, reset=reset)
        return h, tuple(state)

    with pytest.raises(ValueError, match="needs the whole sequence.* over cp: use .*name=fwbw"):
        jax.eval_shape(testing.in_parts(cell, 2), arguments, None)
    jax.eval_shape(testing.in_parts(cell, 1), arguments, None)
    jax.eval_shape(cell, arguments, None)
