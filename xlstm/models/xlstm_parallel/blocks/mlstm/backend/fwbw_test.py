import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbw,
    mLSTMBackendFwbwConfig,
    rev_cumsum,
    rev_cumsum_off,
)


def test_reverse_cumulative_sums():
    x = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(rev_cumsum(x), [[6, 5, 3], [15, 11, 6]])
    np.testing.assert_array_equal(rev_cumsum_off(x), [[5, 3, 0], [11, 6, 0]])


def test_the_exclusive_sum_does_not_cancel():
    np.testing.assert_array_equal(rev_cumsum_off(np.float32([1e9, 1, 2])), [3, 2, 0])


def test_names_and_defaults():
    config = mLSTMBackendFwbwConfig()
    assert (config.chunk_size, config.return_state, config.stabilize_correctly) == (
        512,
        False,
        False,
    )
    assert config.assign_model_config_params(None) == config
    assert mLSTMBackendFwbw.config_class is mLSTMBackendFwbwConfig
    assert mLSTMBackendFwbw(config=config).can_vmap_over_heads is True


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_wrong_chunk_size(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}"):
        mLSTMBackendFwbwConfig(chunk_size=chunk_size)


def test_function_returns_the_state_if_told_to():
    arguments = testing.random_arguments(0, (2,), 9)
    expected_h, expected_state = testing.oracle(
        arguments, np.zeros((2, 9), bool), stabilize_correctly=True
    )
    config = mLSTMBackendFwbwConfig(chunk_size=4, stabilize_correctly=True)
    h = jax.jit(mlstm_fwbw_custom_grad(config))(*arguments)
    assert testing.relative_error(h, expected_h) < 3e-5
    config = mLSTMBackendFwbwConfig(chunk_size=4, stabilize_correctly=True, return_state=True)
    h, state = jax.jit(mlstm_fwbw_custom_grad(config))(*arguments)
    assert testing.relative_error(h, expected_h) < 3e-5
    for x, y in zip(state, expected_state, strict=True):
        assert testing.relative_error(x, y) < 3e-5


def _forget_gradients(f, chunk_size, with_state):
    """Returns the gradients of `f` by the backend and by the oracle."""
    time = f.shape[-1]
    arguments = testing.random_arguments(1, f.shape[:-1], time, with_state=with_state)
    arguments = arguments._replace(f=f.astype(np.float32))
    dh, d_state = testing.random_cotangents(2, arguments)
    cotangents = dh, jax.tree.map(lambda x: x * np.float32(with_state), d_state)
    config = mLSTMBackendFwbwConfig(chunk_size, return_state=True, stabilize_correctly=True)
    function = mlstm_fwbw_custom_grad(config)
    _, grads = testing.outputs_and_gradients(
        lambda arguments, _: function(*arguments), arguments, None, cotangents
    )
    reset = np.zeros(f.shape, bool)
    expected = testing.oracle_gradients(arguments, reset, cotangents, stabilize_correctly=True)
    return np.asarray(grads.f), expected.f


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradient_of_forget_gates_that_are_nearly_shut(chunk_size, with_state):
    # Gradients near exp(-20), less than the rounding of their neighbours in float32.
    f = np.random.default_rng(0).standard_normal((2, 20)) - 20
    actual, expected = _forget_gradients(f, chunk_size, with_state)
    assert testing.relative_error(actual, expected) < 3e-4


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradient_of_shut_gates_among_open_ones(chunk_size):
    f = np.random.default_rng(0).standard_normal((2, 20)) + 4
    shut = np.arange(20) % 5 == 4
    f[:, shut] = -15
    actual, expected = _forget_gradients(f, chunk_size, with_state=True)
    assert testing.relative_error(actual, expected) < 3e-4
    assert testing.relative_error(actual[:, shut], expected[:, shut]) < 3e-3


def test_memory_is_linear_in_time():
    """A chunk's matrix is the largest thing of its kind: nothing of size `T x T` exists."""
    config = mLSTMBackendFwbwConfig(chunk_size=8)
    arguments = testing.random_arguments(0, (1,), 512)

    def loss(arguments):
        return jnp.sum(mlstm_fwbw_custom_grad(config)(*arguments))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(arguments)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert 512 < max(sizes) < 512 * 64
