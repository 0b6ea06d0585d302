import jax
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    causal_forget_matrix,
    rev_cumsum,
    rev_cumsum_off,
    sum_of_spanning_pairs,
)


def forget_matrix(x):
    """Computes the definition in float64, with a separate sum for each entry."""
    x = np.asarray(x, np.float64)
    matrix = np.full((*x.shape, x.shape[-1]), -np.inf)
    for t in range(x.shape[-1]):
        for s in range(t + 1):
            matrix[..., t, s] = x[..., s + 1 : t + 1].sum(-1)
    return matrix


def test_reverse_cumulative_sums():
    x = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(rev_cumsum(x), [[6, 5, 3], [15, 11, 6]])
    np.testing.assert_array_equal(rev_cumsum_off(x), [[5, 3, 0], [11, 6, 0]])


def test_the_exclusive_sum_does_not_cancel():
    np.testing.assert_array_equal(rev_cumsum_off(np.float32([1e9, 1, 2])), [3, 2, 0])


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 64), (2, 1, 5)])
def test_forget_matrix(shape):
    x = -np.random.default_rng(0).exponential(size=shape).astype(np.float32)
    expected = forget_matrix(x)
    actual = jax.jit(causal_forget_matrix)(x)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert np.all(np.diagonal(actual, axis1=-2, axis2=-1) == 0)


@pytest.mark.parametrize(("shut", "tolerance"), [(40, 1e-5), (1e4, 1e-5), (1e7, 5e-4)])
def test_small_sums_beside_huge_ones_keep_their_digits(shut, tolerance):
    # A plain difference of float32 cumulative sums is off by 1e-7 of the largest of them.
    x = -np.random.default_rng(0).exponential(size=(4, 512)).astype(np.float32)
    x[:, ::8] *= shut
    expected = forget_matrix(x)
    lower = np.tril(np.ones((512, 512), bool))
    actual = np.asarray(causal_forget_matrix(x))
    np.testing.assert_allclose(actual[:, lower], expected[:, lower], rtol=1e-6, atol=tolerance)


def test_gradient_of_the_forget_matrix():
    rng = np.random.default_rng(0)
    x = -rng.exponential(size=(3, 9)).astype(np.float32)
    pairs = rng.standard_normal((3, 9, 9)).astype(np.float32)
    expected = np.zeros((3, 9))
    for r in range(9):
        expected[:, r] = pairs[:, r:, :r].sum((-2, -1))
    (actual,) = jax.vjp(causal_forget_matrix, x)[1](pairs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sum_of_spanning_pairs(pairs), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_does_not_cancel():
    # Terms that do not span a gate are huge compared with terms that do.
    pairs = np.zeros((3, 3), np.float32)
    pairs[0, 0] = pairs[1, 0] = pairs[2, 2] = 1e9
    pairs[2, 1] = 1
    np.testing.assert_array_equal(sum_of_spanning_pairs(pairs), [0, 1e9, 1])
