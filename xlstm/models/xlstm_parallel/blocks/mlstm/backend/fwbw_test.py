import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import programs, testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import mLSTMBackend
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    fwbw_backward,
    fwbw_forward,
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbw,
    mLSTMBackendFwbwConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import Device

CONFIG = mLSTMBackendFwbwConfig(chunk_size=4, stabilize_correctly=True)


def with_gradients(config, arguments, cotangents):
    """Returns the output and the last state, and the gradients of the given arguments."""
    return testing.outputs_and_gradients(_cell(config), arguments, None, cotangents)


@functools.cache
def _cell(config):
    function = mlstm_fwbw_custom_grad(dataclasses.replace(config, return_state=True))
    return lambda arguments, _: function(*arguments)


def directly(config, arguments, cotangents):
    """Returns the same from direct calls of the two passes, which share only the context."""
    q, k, v, i, f, *initial = arguments
    forward, backward = _passes(config)
    h, ctx = forward(q, k, v, i, f, *initial)
    dh, d_last = cotangents
    return (h, tuple(ctx.last_state)), backward(ctx, dh, *d_last)


@functools.cache
def _passes(config):
    return (
        jax.jit(lambda q, k, v, i, f, *initial: fwbw_forward(q, k, v, i, f, config, *initial)),
        jax.jit(lambda ctx, dh, *d_last: fwbw_backward(ctx, dh, config, *d_last)),
    )


def assert_trees_close(actual, expected, tolerance=2e-6):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * 10)


def test_defaults():
    assert dataclasses.asdict(mLSTMBackendFwbwConfig()) == {
        "chunk_size": 512,
        "return_state": False,
        "use_initial_state": False,
        "keep_G": False,
        "keep_gates": True,
        "keep_M": False,
        "keep_c": False,
        "stabilize_correctly": False,
        "implementation": "auto",
    }


def test_names_and_positions():
    def names(function):
        return list(inspect.signature(function).parameters)

    initial = ["initial_C", "initial_n", "initial_m"]
    assert names(fwbw_forward)[:9] == ["q", "k", "v", "i", "f", "config", *initial]
    last = ["dc_last", "dn_last", "dm_last"]
    assert names(fwbw_backward)[:6] == ["ctx", "dh", "config", *last]
    assert names(mlstm_fwbw_custom_grad(CONFIG))[:8] == ["q", "k", "v", "i", "f", *initial]
    assert names(mLSTMBackendFwbw.__call__)[1:10] == (
        ["q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "return_last_states"]
    )
    backend = mLSTMBackendFwbw(config=CONFIG)
    assert isinstance(backend, mLSTMBackend) and backend.can_vmap_over_heads is True
    assert mLSTMBackendFwbw.config_class is mLSTMBackendFwbwConfig
    assert CONFIG.assign_model_config_params(None) == CONFIG


@pytest.mark.parametrize("chunk_size", [0, -2, -3])
def test_wrong_chunk_size(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}"):
        mLSTMBackendFwbwConfig(chunk_size=chunk_size)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes_and_the_two_passes_on_their_own(leading, keeps):
    options = dict.fromkeys(("keep_G", "keep_gates", "keep_M", "keep_c"), keeps)
    config = dataclasses.replace(CONFIG, **options)
    arguments = testing.random_arguments(0, leading, 9)
    cotangents = testing.random_cotangents(1, arguments)
    reset = np.zeros((*leading, 9), bool)
    h, state, _ = testing.oracle(arguments, reset, stabilize_correctly=True)
    expected = testing.oracle_gradients(arguments, reset, cotangents, stabilize_correctly=True)
    for function in (with_gradients, directly):
        outputs, gradients = function(config, arguments, cotangents)
        for x, y in zip(jax.tree.leaves(outputs), (h, *state), strict=True):
            assert testing.relative_error(x, y) < 3e-5
        assert len(gradients) == 8
        for x, y in zip(gradients, expected, strict=True):
            assert testing.relative_error(x, y) < 3e-4


@pytest.mark.parametrize("stabilize_correctly", [False, True])
@pytest.mark.parametrize("given", [(), (0,), (1,), (2,), (0, 2)])
def test_gradients_of_the_last_state_may_be_left_out(given, stabilize_correctly):
    config = dataclasses.replace(CONFIG, stabilize_correctly=stabilize_correctly)
    arguments = testing.random_arguments(0, (2,), 9)
    dh, d_last = testing.random_cotangents(1, arguments)
    some = [x if at in given else None for at, x in enumerate(d_last)]
    zeros = [x if at in given else np.zeros_like(x) for at, x in enumerate(d_last)]
    actual, expected = (directly(config, arguments, (dh, x))[1] for x in (some, zeros))
    assert_trees_close(actual, expected)


def test_no_initial_state_is_the_zero_state():
    arguments = testing.random_arguments(0, (2,), 9, with_state=False)
    cotangents = testing.random_cotangents(1, arguments)
    nothing = arguments._replace(C=None, n=None, m=None)
    # The gradients of the state exist as well.
    assert_trees_close(
        directly(CONFIG, nothing, cotangents), directly(CONFIG, arguments, cotangents)
    )
    _, actual = with_gradients(CONFIG, nothing, cotangents)
    _, expected = with_gradients(CONFIG, arguments, cotangents)
    assert actual[5:] == (None, None, None)
    assert_trees_close(actual[:5], expected[:5])


def test_function_returns_the_state_only_if_told_to():
    arguments = testing.random_arguments(0, (2,), 9)
    h = jax.jit(mlstm_fwbw_custom_grad(CONFIG))(*arguments)
    config = dataclasses.replace(CONFIG, return_state=True)
    same, (C, n, m) = jax.jit(mlstm_fwbw_custom_grad(config))(*arguments)
    np.testing.assert_array_equal(h, same)
    assert (C.shape, n.shape, m.shape) == ((2, 4, 6), (2, 4), (2,))


def test_gates_with_a_last_axis():
    arguments = testing.random_arguments(0, (2,), 9)
    cotangents = testing.random_cotangents(1, arguments)
    gates = {"i": arguments.i[..., None], "f": arguments.f[..., None]}
    outputs, gradients = with_gradients(CONFIG, arguments._replace(**gates), cotangents)
    expected, expected_gradients = with_gradients(CONFIG, arguments, cotangents)
    assert_trees_close(outputs, expected)
    gates = {"i": expected_gradients.i[..., None], "f": expected_gradients.f[..., None]}
    assert_trees_close(gradients, expected_gradients._replace(**gates))


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_heads_is_the_heads_folded_in(axis):
    arguments = testing.random_arguments(0, (2, 3), 9)
    cotangents = testing.random_cotangents(1, arguments)
    expected = with_gradients(CONFIG, arguments, cotangents)
    mapped = jax.vmap(lambda *x: with_gradients(CONFIG, *x), in_axes=axis, out_axes=axis)
    assert_trees_close(mapped(arguments, cotangents), expected)


@pytest.mark.parametrize("with_reset", [False, True])
def test_an_accelerator_needs_no_loop(monkeypatch, with_reset):
    monkeypatch.setattr(programs, "current_device", lambda: Device("gpu", "NVIDIA A100"))
    problem = testing.problem(65, with_reset=with_reset)
    function = mlstm_fwbw_custom_grad(dataclasses.replace(CONFIG, return_state=True))
    reset = problem.reset if with_reset else None

    def cell(arguments, _):
        h, state = function(*arguments, reset=reset)
        return h, tuple(state)

    solution = testing.outputs_and_gradients(cell, problem.arguments, None, problem.cotangents)
    testing.assert_solves(problem, *solution)

    def both(arguments):
        outputs, pull_back = jax.vjp(lambda arguments: cell(arguments, None), arguments)
        return outputs, pull_back(problem.cotangents)

    equations = _equations(jax.make_jaxpr(both)(problem.arguments).jaxpr)
    assert not [equation for equation in equations if equation.primitive.name == "scan"]


def test_scan_and_remat_of_layers():
    """Layers that are scanned and recomputed have the gradients of the same layers unrolled."""
    first = testing.random_arguments(0, (2,), 9, v_dim=4)
    second = testing.random_arguments(1, (2,), 9, v_dim=4)
    layers = jax.tree.map(lambda *xs: np.stack(xs), first, second)
    function = mlstm_fwbw_custom_grad(CONFIG)

    def layer(x, arguments):
        return x + function(x, *arguments[1:]), None

    def scanned(x, layers):
        return jnp.sum(jnp.sin(lax.scan(jax.checkpoint(layer), x, layers)[0]))

    def unrolled(x, layers):
        for at in range(2):
            x, _ = layer(x, jax.tree.map(lambda leaf, at=at: leaf[at], layers))
        return jnp.sum(jnp.sin(x))

    actual, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(first.q, layers) for f in (scanned, unrolled)
    )
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_at_a_real_size(dtype):
    config = mLSTMBackendFwbwConfig(64, stabilize_correctly=True)
    arguments = testing.random_arguments(0, (1, 2), 256, qk_dim=64, v_dim=128)
    rounded = arguments._replace(
        **{key: jnp.asarray(getattr(arguments, key), dtype) for key in "qkv"}
    )
    exact = rounded._replace(**{key: getattr(rounded, key).astype(jnp.float32) for key in "qkv"})
    _, _, is_well_conditioned = testing.oracle(
        exact, np.zeros((1, 2, 256), bool), stabilize_correctly=True
    )
    dh, d_state = testing.random_cotangents(1, arguments)
    dh = jnp.asarray(dh * is_well_conditioned[..., None], dtype)
    outputs, gradients = with_gradients(config, rounded, (dh, d_state))
    expected, expected_gradients = with_gradients(config, exact, (dh.astype(jnp.float32), d_state))
    (h, state), (expected_h, expected_state) = outputs, expected
    assert h.dtype == dtype
    mask = is_well_conditioned
    assert testing.relative_error(h[mask], expected_h[mask]) < 2e-2
    for x, y in zip(state, expected_state, strict=True):
        assert x.dtype == jnp.float32
        assert testing.relative_error(x, y) < 2e-2
    for key, x, y in zip(arguments._fields, gradients, expected_gradients, strict=True):
        assert x.dtype == (dtype if key in "qkv" else jnp.float32)
        assert testing.relative_error(x, y) < 5e-2, key


@functools.cache
def _temporary_memory(time, layers, config):
    """Returns the bytes of a scan of layers without its arguments and gradients, for 4 heads."""
    function = mlstm_fwbw_custom_grad(config)

    def loss(q, k, v, i, f):
        layer = lambda v, _: (v + function(q, k, v, i, f), None)  # noqa: E731
        return jnp.sum(jnp.square(lax.scan(layer, v, None, length=layers)[0]))

    arguments = testing.random_arguments(0, (1, 4), time, qk_dim=32, v_dim=64)[:5]
    run = jax.jit(jax.value_and_grad(loss, argnums=range(5)))
    compiled = run.lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("option", "numbers"), [("keep_c", 4 * 1024 // 16 * 32 * 64), ("keep_G", 4 * 1024 * 16)]
)
def test_what_is_not_kept_takes_no_memory(option, numbers):
    layers = 4
    kept, computed_again = (
        _temporary_memory(1024, layers, mLSTMBackendFwbwConfig(**{"chunk_size": 16, option: value}))
        for value in (True, False)
    )
    # All layers keep their arrays, but only one layer at a time recomputes its own.
    assert kept - computed_again > 4 * numbers * (layers - 1.5)


def test_memory_is_linear_in_time():
    config = mLSTMBackendFwbwConfig(chunk_size=16)
    small, large = (_temporary_memory(time, 1, config) for time in (1024, 4096))
    assert large < 4.2 * small
    assert large < 4 * 4 * 4096**2  # Bytes of a matrix of all pairs.


def _equations(jaxpr):
    """Yields all equations, including nested ones."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_the_graph_does_not_grow_with_time():
    def loss(arguments):
        return jnp.sum(mlstm_fwbw_custom_grad(CONFIG)(*arguments))

    numbers, largest = [], []
    for time in (64, 1024):
        arguments = testing.random_arguments(0, (1,), time)
        equations = list(_equations(jax.make_jaxpr(jax.grad(loss))(arguments).jaxpr))
        numbers.append(len(equations))
        largest.append(max(v.aval.size for x in equations for v in x.outvars))
    assert numbers[0] == numbers[1] > 50
    assert largest[1] == 16 * largest[0]


def test_cotangents_of_wrong_shapes():
    arguments = testing.random_arguments(0, (2,), 9)
    q, k, v, i, f, *initial = arguments
    forward, backward = _passes(CONFIG)
    _, ctx = jax.eval_shape(forward, q, k, v, i, f, *initial)
    with pytest.raises(ValueError, match=r"dh has the shape \(2, 8, 6\), expected \(2, 9, 6\)"):
        jax.eval_shape(backward, ctx, v[:, :8])
    with pytest.raises(ValueError, match=r"dn_last has the shape \(2, 4, 6\), expected \(2, 4\)"):
        jax.eval_shape(backward, ctx, v, None, arguments.C)
