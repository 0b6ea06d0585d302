"""Tests of the cell and its gradient against a step-by-step float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from xlstm.models.xlstm_parallel.blocks.slstm.cell import (
    SLSTMState,
    gate_preactivations,
    slstm,
    zero_state,
)

_B, _DX, _DH = 2, 5, 3
_TIMES = (1, 2, 7, 64, 257)


def _oracle(z, i, f, o, recurrent, state, *, reset, padding, forget_gate):
    """Computes the equations of the paper token by token, including all options of `slstm`."""

    def step(state, token):
        (z, i, f, o), reset, padding = token
        dropped = jax.tree.map(lambda x: jnp.where(reset, 0.0, x), state)
        h, c, n, m = dropped
        mixed = jnp.split(jnp.einsum("bnd,nde->bne", h, recurrent), 4, axis=-1)
        z, i, f, o = (x + y for x, y in zip((z, i, f, o), mixed, strict=True))
        log_f = -jnp.logaddexp(0.0, -f) if forget_gate == "sigmoid" else f
        is_empty = n == 0
        new_m = jnp.where(is_empty, i, jnp.maximum(log_f + m, i))
        keep = jnp.where(is_empty, 0.0, jnp.exp(jnp.where(is_empty, 0.0, log_f + m - new_m)))
        c = keep * c + jnp.exp(i - new_m) * jnp.tanh(z)
        n = keep * n + jnp.exp(i - new_m)
        new = SLSTMState(c / n / (1 + jnp.exp(-o)), c, n, new_m)
        new = jax.tree.map(lambda a, b: jnp.where(padding, a, b), state, new)
        return new, new.h

    masks = (mask.T[:, :, None, None] for mask in (reset, padding))
    tokens = tuple(jnp.moveaxis(x, 2, 0) for x in (z, i, f, o)), *masks
    last, h = lax.scan(step, state, tokens)
    return jnp.moveaxis(h, 0, 2), last


def _arguments(seed, num_heads, time, gate_scale, with_state):
    """Returns inputs, their weights and biases, recurrent weights, state, resets and padding."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    scales = np.array([1, gate_scale, gate_scale, 1], np.float32)[:, None, None]
    arguments = {
        "x": normal(_B, num_heads, time, _DX),
        "w": normal(4, num_heads, _DX, _DH, scale=0.5) * scales[..., None],
        "b": normal(4, num_heads, _DH) * scales,
        "recurrent": normal(num_heads, _DH, 4 * _DH, scale=0.5),
        "state": SLSTMState(*(normal(_B, num_heads, _DH) * with_state for _ in range(4))),
    }
    arguments["state"] = arguments["state"]._replace(n=np.abs(arguments["state"].n))
    padding = np.zeros((_B, time), bool)
    padding[0, time - time // 3 :] = True
    reset = (rng.random((_B, time)) < 0.1) & ~padding
    cotangents = normal(_B, num_heads, time, _DH) * ~padding[:, None, :, None]
    states = SLSTMState(*(normal(_B, num_heads, _DH) for _ in range(4)))
    return arguments, (cotangents, states), {"reset": reset, "padding": padding}


@functools.partial(jax.jit, static_argnames=("cell", "forget_gate"))
def _run(arguments, cotangents, masks, cell, forget_gate):
    """Returns outputs, last states, and gradients of all arguments."""

    def run(x, w, b, recurrent, state):
        inputs = jnp.einsum("bntd,gnde->gbnte", x, w) + b[:, None, :, None]
        return cell(*inputs, recurrent, state, **masks, forget_gate=forget_gate)

    outputs, vjp = jax.vjp(lambda arguments: run(**arguments), arguments)
    return outputs, vjp(cotangents)[0]


def _assert_is_the_oracle_s(arguments, cotangents, masks, forget_gate):
    found = _run(arguments, cotangents, masks, slstm, forget_gate)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arguments, cotangents))
        expected = jax.device_get(_run(*wide, masks, _oracle, forget_gate))
    assert found[0][0].dtype == np.float32 and expected[0][0].dtype == np.float64
    is_real = ~masks["padding"][:, None, :, None]
    found, expected = (
        ((np.where(is_real, h, 0), last), grads) for (h, last), grads in (found, expected)
    )

    def check(path, found, expected, rtol):
        error = np.abs(found - expected).max()
        assert error <= rtol * np.abs(expected).max(), (jax.tree_util.keystr(path), error)

    for found_part, expected_part, rtol in zip(found, expected, (1e-5, 1e-4), strict=True):
        jax.tree_util.tree_map_with_path(
            functools.partial(check, rtol=rtol), found_part, expected_part
        )


@pytest.mark.parametrize("time", _TIMES)
@pytest.mark.parametrize("num_heads, forget_gate", [(1, "sigmoid"), (4, "exponential")])
def test_outputs_states_and_gradients_are_the_oracle_s(num_heads, forget_gate, time):
    for seed, (gate_scale, with_state) in enumerate([(1, True), (1, False), (20, True)]):
        case = _arguments(seed, num_heads, time, gate_scale, with_state)
        _assert_is_the_oracle_s(*case, forget_gate)


@pytest.mark.parametrize("num_heads", [2, 3])
def test_other_numbers_of_heads(num_heads):
    _assert_is_the_oracle_s(*_arguments(7, num_heads, 7, 1, True), "sigmoid")


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exponential"])
@pytest.mark.parametrize("gate", [1e4, -1e4])
def test_gates_and_inputs_of_any_size(gate, forget_gate):
    rng = np.random.default_rng(0)
    signs = np.sign(rng.standard_normal((4, _B, 2, 40, _DH))).astype(np.float32)
    recurrent = rng.standard_normal((2, _DH, 4 * _DH)).astype(np.float32)
    for inputs in (signs * 1e4, np.full_like(signs, gate)):
        state = zero_state((_B, 2, _DH))

        def total(inputs, recurrent, state):
            h, last = slstm(*inputs, recurrent, state, forget_gate=forget_gate)
            return h.sum() + sum(jnp.sum(x) for x in last), (h, last)

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
        (_, (h, last)), grads = run(inputs, recurrent, state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((h, last, grads)))
        # The output is an average of cell inputs, times a gate.
        assert np.abs(h).max() <= 1


def test_the_last_state_goes_on_where_it_was():
    (arguments, _, _) = _arguments(3, 2, 9, 1, True)
    inputs = np.moveaxis(np.random.default_rng(0).standard_normal((9, 4, _B, 2, _DH)), 0, 3)
    inputs = inputs.astype(np.float32)
    run = jax.jit(slstm)
    whole, last = run(*inputs, arguments["recurrent"], arguments["state"])
    state, outputs = arguments["state"], []
    for t in range(9):
        h, state = run(*inputs[:, :, :, t : t + 1], arguments["recurrent"], state)
        outputs.append(h)
    np.testing.assert_allclose(np.concatenate(outputs, axis=2), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)
    # Without a given state the cell starts from zeros and returns no state.
    h, none = run(*inputs, arguments["recurrent"])
    assert none is None
    expected, _ = run(*inputs, arguments["recurrent"], zero_state((_B, 2, _DH)))
    np.testing.assert_array_equal(h, expected)


def test_documents_in_a_row_are_what_they_are_alone():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 1, 2, 9, _DH)).astype(np.float32)
    recurrent = rng.standard_normal((2, _DH, 4 * _DH)).astype(np.float32)
    reset = np.arange(9)[None] == 4
    packed, _ = slstm(*inputs, recurrent, reset=reset)
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = slstm(*inputs[:, :, :, part], recurrent)
        np.testing.assert_allclose(packed[:, :, part], alone, atol=1e-6)
    i = gate_preactivations(inputs, recurrent, packed, None, reset)[1]
    np.testing.assert_array_equal(i[:, :, 4], inputs[1][:, :, 4])
    mixed = np.einsum("nd,nde->ne", packed[0, :, 6], recurrent)[:, _DH : 2 * _DH]
    np.testing.assert_allclose(i[0, :, 7], inputs[1][0, :, 7] + mixed, atol=1e-5)


def test_bfloat16_rounds_a_little():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 1, 2, 20, _DH)).astype(np.float32)
    recurrent = 0.3 * rng.standard_normal((2, _DH, 4 * _DH)).astype(np.float32)
    h, last = slstm(
        *jnp.asarray(inputs, jnp.bfloat16),
        jnp.asarray(recurrent, jnp.bfloat16),
        zero_state((1, 2, _DH)),
    )
    expected, _ = slstm(*inputs, recurrent)
    assert h.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in last)
    assert 1e-5 < np.abs(h - expected).max() < 0.05


def test_what_does_not_fit():
    x = jnp.zeros((1, 2, 3, 4))
    recurrent = jnp.zeros((2, 4, 16))
    with pytest.raises(ValueError, match=r"expected one shape \(B, NH, T, DH\)"):
        slstm(x, x, x, x[:, :1], recurrent)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 12\), expected \(2, 4, 16\)"):
        slstm(x, x, x, x, recurrent[..., :12])
    with pytest.raises(ValueError, match="forget_gate='linear' is unknown; expected one of"):
        slstm(x, x, x, x, recurrent, forget_gate="linear")
