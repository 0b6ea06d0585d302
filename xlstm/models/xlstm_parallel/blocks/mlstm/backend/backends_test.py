import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BACKEND_NAMES, BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import BACKENDS, create_backend

NAMES = ("fwbw", "parallel_stabilized", "recurrent")
HEADS = 2


@functools.cache
def cell_of(name, chunk_size=0, stabilize_correctly=True):
    """Returns the backend as a function of its differentiable arguments."""
    backend = create_backend(BackendConfig(name, chunk_size, stabilize_correctly))

    def cell(arguments, reset):
        return backend.apply({}, *arguments, return_last_states=True, reset=reset)

    return cell


@pytest.mark.parametrize(
    ("name", "time", "chunk_size", "stabilize_correctly"),
    [
        ("fwbw", 1, 0, True),
        ("fwbw", 65, 0, True),
        ("fwbw", 65, 1, True),
        ("fwbw", 65, 16, True),
        ("fwbw", 65, 16, False),
        ("parallel_stabilized", 1, 0, True),
        ("parallel_stabilized", 65, 0, True),
        ("parallel_stabilized", 17, 0, False),
        ("recurrent", 1, 0, True),
        ("recurrent", 65, 0, True),
        ("recurrent", 17, 0, False),
    ],
)
def test_outputs_states_and_gradients_with_resets(name, time, chunk_size, stabilize_correctly):
    problem = testing.problem(time, with_reset=True, stabilize_correctly=stabilize_correctly)
    cell = cell_of(name, chunk_size, stabilize_correctly)
    actual = testing.outputs_and_gradients(
        cell, problem.arguments, problem.reset, problem.cotangents
    )
    testing.assert_solves(problem, *actual)


@pytest.mark.parametrize("time", [2, 200])
@pytest.mark.parametrize("name", ["parallel_stabilized", "recurrent"])  # grid_test covers fwbw.
def test_outputs_states_and_gradients(name, time):
    problem = testing.problem(time, with_reset=False)
    actual = testing.outputs_and_gradients(
        cell_of(name), problem.arguments, None, problem.cotangents
    )
    testing.assert_solves(problem, *actual)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_is_the_zero_state_and_no_reset_resets_nowhere(name):
    arguments = testing.random_arguments(0, (HEADS,), 9, with_state=False)
    backend = create_backend(BackendConfig(name, 4))
    h = jax.jit(lambda *args: backend.apply({}, *args))(*arguments[:5])
    expected, *_ = testing.oracle(arguments, np.zeros((HEADS, 9), bool), stabilize_correctly=True)
    assert testing.relative_error(h, expected) < 3e-5


def assert_trees_close(actual, expected, tolerance=2e-6):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_the_documents_alone(name):
    lengths = (1, 9, 6)
    documents = [
        testing.random_arguments(seed, (HEADS,), length, with_state=False)
        for seed, length in enumerate(lengths)
    ]
    starts = np.cumsum((0, *lengths))
    tokens = [np.concatenate(x, axis=1) for x in list(zip(*documents, strict=True))[:5]]
    packed = testing.Arguments(*tokens, *documents[0][5:])
    reset = np.isin(np.arange(starts[-1]), starts)
    dh, d_state = testing.random_cotangents(7, packed)
    cell = cell_of(name, 4)
    (h, state), grads = testing.outputs_and_gradients(cell, packed, reset, (dh, d_state))
    for document, start, end in zip(documents, starts, starts[1:], strict=False):
        part = slice(start, end)
        is_last = end == starts[-1]
        cotangents = dh[:, part], jax.tree.map(lambda x, last=is_last: x * last, d_state)
        alone, alone_grads = testing.outputs_and_gradients(cell, document, None, cotangents)
        assert_trees_close(h[:, part], alone[0])
        assert_trees_close([x[:, part] for x in grads[:5]], list(alone_grads[:5]))
        if is_last:
            assert_trees_close(state, alone[1])
    # The reset also drops the state before the first token.
    assert all(np.all(x == 0) for x in grads[5:])


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("stabilize_correctly", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_cut_in_two_is_the_whole(name, stabilize_correctly, with_reset):
    problem = testing.problem(17, with_reset=with_reset, stabilize_correctly=stabilize_correctly)
    cell = cell_of(name, 4, stabilize_correctly)

    def in_two(arguments, reset):
        first = [x[:, :, :6] for x in arguments[:5]]
        second = [x[:, :, 6:] for x in arguments[:5]]
        h1, state = cell((*first, *arguments[5:]), reset[:, :, :6] if with_reset else None)
        h2, state = cell((*second, *state), reset[:, :, 6:] if with_reset else None)
        return jnp.concatenate([h1, h2], axis=2), state

    actual = testing.outputs_and_gradients(
        in_two, problem.arguments, problem.reset, problem.cotangents
    )
    testing.assert_solves(problem, *actual)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs(name):
    arguments = testing.random_arguments(5, (HEADS,), 33)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arguments[:3])
    arguments = arguments._replace(q=q, k=k, v=v)
    h, state = jax.jit(cell_of(name, 16))(arguments, None)
    expected, expected_state, _ = testing.oracle(
        arguments, np.zeros((HEADS, 33), bool), stabilize_correctly=True
    )
    assert h.dtype == jnp.bfloat16
    assert testing.relative_error(h, expected) < 2e-2
    for x, y in zip(state, expected_state, strict=True):
        assert x.dtype == jnp.float32
        assert testing.relative_error(x, y) < 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_works_in_double_precision(name):
    with jax.enable_x64(True):
        arguments = testing.random_arguments(6, (HEADS,), 10)
        arguments = jax.tree.map(lambda x: x.astype(np.float64), arguments)
        reset = np.broadcast_to(np.arange(10) == 4, (HEADS, 10))
        h, state = jax.jit(cell_of(name, 4))(arguments, reset)
        expected, expected_state, _ = testing.oracle(arguments, reset, stabilize_correctly=True)
        assert h.dtype == np.float64
        assert_trees_close((h, tuple(state)), (expected, expected_state), tolerance=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_under_jit_shard_map_scan_checkpoint_and_vmap(name):
    arguments = testing.random_arguments(8, (8, 3, HEADS), 6)
    cotangents = testing.random_cotangents(9, arguments)
    cell = cell_of(name, 4)
    spec = PartitionSpec("dp")

    def over_heads(arguments):
        return jax.vmap(lambda x: cell(x, None))(arguments)

    def over_sequences(arguments):
        def body(_, x):
            return None, jax.checkpoint(over_heads)(x)

        return lax.map(lambda x: lax.scan(body, None, x)[1], arguments)

    transformed = jax.shard_map(
        over_sequences,
        mesh=Mesh(jax.devices(), ("dp",)),
        in_specs=spec,
        out_specs=spec,
    )
    actual = testing.outputs_and_gradients(
        lambda arguments, _: transformed(arguments), arguments, None, cotangents
    )
    expected = testing.outputs_and_gradients(cell, arguments, None, cotangents)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("replicated", ["q", "k", "v", "if", "Cnm"])
@pytest.mark.parametrize("name", NAMES)
def test_shard_map_of_sequences_that_share_an_argument(name, replicated):
    devices = len(jax.devices())
    arguments = testing.random_arguments(8, (devices * 3, HEADS), 6)
    cotangents = testing.random_cotangents(9, arguments)
    shared = [key in replicated for key in arguments._fields]
    given = testing.Arguments(
        *(x[:3] if is_shared else x for x, is_shared in zip(arguments, shared, strict=True))
    )
    specs = [PartitionSpec() if is_shared else PartitionSpec("dp") for is_shared in shared]
    cell = cell_of(name, 4)
    transformed = jax.shard_map(
        lambda arguments: cell(arguments, None),
        mesh=Mesh(jax.devices(), ("dp",)),
        in_specs=(testing.Arguments(*specs),),
        out_specs=PartitionSpec("dp"),
    )

    actual = testing.outputs_and_gradients(
        lambda arguments, _: transformed(arguments), given, None, cotangents
    )
    repeated = testing.Arguments(
        *(
            np.concatenate([x] * devices) if is_shared else x
            for x, is_shared in zip(given, shared, strict=True)
        )
    )
    outputs, gradients = testing.outputs_and_gradients(cell, repeated, None, cotangents)
    gradients = testing.Arguments(
        *(
            np.reshape(x, (devices, 3, *x.shape[1:])).sum(axis=0) if is_shared else x
            for x, is_shared in zip(gradients, shared, strict=True)
        )
    )
    assert_trees_close(actual, (outputs, gradients))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes(name):
    arguments = testing.random_arguments(0, (3, HEADS), 5)
    backend = create_backend(BackendConfig(name))
    wrong = {
        "k": (arguments.k[..., :3], "(3, 2, 5, 3)", "(3, 2, 5, 4)"),
        "v": (arguments.v[..., :4, :], "(3, 2, 4, 6)", "(3, 2, 5, 6)"),
        "i": (arguments.i[:2], "(2, 2, 5)", "(3, 2, 5)"),
        "f": (arguments.f[..., :1], "(3, 2, 1)", "(3, 2, 5)"),
        "C": (arguments.C[..., :1], "(3, 2, 4, 1)", "(3, 2, 4, 6)"),
        "n": (arguments.n[..., :1], "(3, 2, 1)", "(3, 2, 4)"),
        "m": (arguments.m[..., :1], "(3, 1)", "(3, 2)"),
    }
    for key, (value, given, expected) in wrong.items():
        with pytest.raises(ValueError) as error:
            backend.apply({}, *arguments._replace(**{key: value}))
        message = str(error.value)
        assert f"{key} has the shape {given}" in message
        assert f"expected {expected}" in message
    with pytest.raises(ValueError, match="q has the shape.*T >= 1"):
        backend.apply({}, *jax.tree.map(lambda x: x[..., :0, :], arguments))
    with pytest.raises(ValueError, match="reset has the shape.*does not broadcast"):
        backend.apply({}, *arguments, reset=np.zeros(4, bool))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_wrong_types(name, dtype):
    arguments = testing.random_arguments(0, (3, HEADS), 5)
    backend = create_backend(BackendConfig(name))
    for key, x in arguments._asdict().items():
        with pytest.raises(ValueError) as error:
            backend.apply({}, *arguments._replace(**{key: x.astype(dtype)}))
        described = f"{key} has the type {dtype} (shape {x.shape}), expected a floating-point type"
        assert described in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_that_is_not_bool(name):
    arguments = testing.random_arguments(0, (3, HEADS), 5)
    backend = create_backend(BackendConfig(name))
    with pytest.raises(
        ValueError, match=r"reset has the type int32 \(shape \(5,\)\), expected bool"
    ):
        backend.apply({}, *arguments, reset=np.zeros(5, np.int32))


@pytest.mark.parametrize("given", range(5, 8))
def test_a_part_of_an_initial_state_is_refused(given):
    arguments = testing.random_arguments(0, (HEADS,), 5)
    arguments = [x if at < 5 or at == given else None for at, x in enumerate(arguments)]
    with pytest.raises(ValueError, match="expected all of C, n and m, or none"):
        create_backend(BackendConfig("fwbw")).apply({}, *arguments)


def test_gates_may_have_a_last_axis():
    arguments = testing.random_arguments(0, (HEADS,), 5)
    backend = create_backend(BackendConfig("recurrent"))
    with_axis = arguments._replace(i=arguments.i[..., None], f=arguments.f[..., None])
    assert_trees_close(backend.apply({}, *with_axis), backend.apply({}, *arguments), 0)


def test_every_name_is_registered():
    assert tuple(BACKENDS) == BACKEND_NAMES


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fwbv' is unknown; expected one of fwbw, para.*recur"):
        BackendConfig("fwbv")


def test_negative_chunk_size():
    with pytest.raises(ValueError, match="chunk_size=-2"):
        BackendConfig("fwbw", chunk_size=-2)
