import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.convolution import CausalConvolution

B, T, C, W = 2, 9, 3, 4
RNG = np.random.default_rng(0)
X, STATE = (RNG.standard_normal((B, time, C), np.float32) for time in (T, W - 1))
PARAMS = {"kernel": RNG.standard_normal((W, 1, C)), "bias": RNG.standard_normal(C)}
RESET = np.zeros((B, T), bool)
RESET[0, [2, 3, 7]] = RESET[1, 0] = True


@jax.jit
def convolve(x, reset=None, padding=None, state=None):
    return CausalConvolution(W).apply({"params": PARAMS}, x, reset, padding, state)


def one_after_the_other(x, reset, state):
    """Computes the definition, where a reset drops all inputs so far; returns the last inputs."""
    y = np.empty_like(x)
    for row in range(len(x)):
        last = list(state[row])
        for t in range(x.shape[1]):
            last = [np.zeros(C)] * (W - 1) if reset[row, t] else last
            last = [*last, x[row, t]]
            y[row, t] = PARAMS["bias"] + sum(PARAMS["kernel"][j, 0] * last[j] for j in range(W))
            last = last[1:]
        state[row] = last
    return y, state


@pytest.mark.parametrize("reset", [None, RESET])
@pytest.mark.parametrize("state", [None, STATE])
def test_is_the_sum_over_the_last_inputs(reset, state):
    y, last = convolve(X, reset, state=state)
    before = np.zeros_like(STATE) if state is None else state.copy()
    expected, expected_last = one_after_the_other(X, RESET & (reset is not None), before)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    if state is None:
        assert last is None
    else:
        np.testing.assert_allclose(last, expected_last, atol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 6])
def test_padding_leaves_no_trace(length):
    padding = np.arange(6) >= np.array([length, 6])[:, None]
    y, state = convolve(X[:, :6], RESET[:, :6], padding, STATE)
    for row, count in ((0, length), (1, 6)):
        here = slice(row, row + 1)
        expected = one_after_the_other(X[here, :count], RESET[here, :count], STATE[here].copy())
        np.testing.assert_allclose(y[here, :count], expected[0], atol=1e-5)
        np.testing.assert_allclose(state[here], expected[1], atol=1e-6)


def test_a_width_of_one_sees_its_own_token():
    y, state = CausalConvolution(1).apply(
        {"params": PARAMS | {"kernel": PARAMS["kernel"][:1]}}, X, RESET, None, STATE[:, :0]
    )
    np.testing.assert_allclose(y, X * PARAMS["kernel"][0] + PARAMS["bias"], atol=1e-5)
    assert state.shape == (B, 0, C)


def test_parameters_are_float32_and_boxed():
    x = jnp.ones((1, 2, 4096))
    (y, state), variables = CausalConvolution(W, jnp.bfloat16).init_with_output(
        jax.random.key(0), x, state=jnp.zeros((1, W - 1, 4096))
    )
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert kernel.names == (None, None, "tp") and bias.names == ("tp",)
    assert kernel.value.dtype == bias.value.dtype == state.dtype == jnp.float32
    assert kernel.value.shape == (W, 1, 4096) and np.all(bias.value == np.zeros(4096))
    np.testing.assert_allclose(kernel.value.std(), np.sqrt(2 / (5 * W)), rtol=0.03)
    assert y.dtype == jnp.bfloat16
