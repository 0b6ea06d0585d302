import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import divide_by_normalizer

NUMERATOR = np.array([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0], [7.0, 8.0]])
QN = np.array([2.0, -3.0, 0.01, 0.0])
M = np.array([1.0, 1.0, 2.0, -3.0])


def definition(numerator, qn, m, stabilize_correctly):
    bound = jnp.exp(-m) if stabilize_correctly else 1.0
    denominator = jnp.maximum(jnp.abs(qn), bound)
    if not stabilize_correctly:
        denominator = jax.lax.stop_gradient(denominator)
    return numerator / denominator[..., None]


@pytest.mark.parametrize("stabilize_correctly", [False, True])
def test_value_and_gradient_are_those_of_the_definition(stabilize_correctly):
    with jax.enable_x64(True):
        dh = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0], [1.0, 1.0]])

        def run(function):
            h, vjp = jax.vjp(lambda *x: function(*x, M, stabilize_correctly), NUMERATOR, QN)
            return h, *vjp(dh)

        for x, y in zip(run(divide_by_normalizer), run(definition), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-13)


def test_the_log_scale_is_a_constant():
    grad = jax.grad(lambda m: divide_by_normalizer(NUMERATOR, QN, m, True).sum())(M)
    np.testing.assert_array_equal(grad, np.zeros(4))


@pytest.mark.parametrize("m", [200.0, 1e30, -1e30])
@pytest.mark.parametrize("qn", [0.0, 1e-45, -1e-30, 1e-9])
def test_a_normalizer_next_to_zero_leaves_all_finite(m, qn):
    numerator, qn, m = np.float32([[1e4, -1e4]]), np.float32([qn]), np.float32([m])
    h, vjp = jax.vjp(lambda *x: divide_by_normalizer(*x, m, True), numerator, qn)
    for x in (h, *vjp(np.ones((1, 2), np.float32)), *vjp(h / np.abs(h).max().clip(1e-30))):
        assert np.all(np.isfinite(x))
