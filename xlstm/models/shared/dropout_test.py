import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.dropout import dropout, token_keys

_B, _T, _D = 4, 6, 50
_EXAMPLES = jax.random.split(jax.random.PRNGKey(0), _B)
_KEYS = token_keys(_EXAMPLES, _T, 0)
_X = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (_B, _T, _D)), jnp.float32)


def test_drops_the_share_and_keeps_the_mean():
    x = jnp.ones((_B, _T, 1000))
    y = np.asarray(dropout(x, 0.3, _KEYS, 0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    np.testing.assert_allclose((y == 0).mean(), 0.3, atol=0.02)


@pytest.mark.parametrize("rate, keys", [(0.0, _KEYS), (0.5, None)])
def test_nothing_is_dropped_without_rate_or_keys(rate, keys):
    assert dropout(_X, rate, keys, 0) is _X


def test_tokens_and_sites_are_dropped_independently():
    dropped = np.asarray(dropout(_X, 0.5, _KEYS, 0)) == 0
    rows = dropped.reshape(-1, _D)
    assert len(np.unique(rows, axis=0)) == len(rows)
    other = np.asarray(dropout(_X, 0.5, _KEYS, 1)) == 0
    assert 0.3 < (dropped == other).mean() < 0.7


def test_a_part_of_the_tokens_or_examples_is_dropped_as_the_whole_is():
    whole = dropout(_X, 0.5, _KEYS, jnp.int32(3))
    late = dropout(_X[:, 4:], 0.5, token_keys(_EXAMPLES, 2, jnp.int32(4)), 3)
    np.testing.assert_array_equal(late, whole[:, 4:])
    some = dropout(_X[1:3], 0.5, token_keys(_EXAMPLES[1:3], _T, 0), 3)
    np.testing.assert_array_equal(some, whole[1:3])


def test_the_gradient_passes_where_nothing_was_dropped():
    grads = jax.grad(lambda x: jnp.sum(dropout(x, 0.5, _KEYS, 0)))(_X)
    np.testing.assert_array_equal(grads, dropout(jnp.ones_like(_X), 0.5, _KEYS, 0))


def test_new_style_keys_do_as_well():
    examples = jax.random.split(jax.random.key(0), _B)
    np.testing.assert_array_equal(
        dropout(_X, 0.5, token_keys(examples, _T, 0), 0), dropout(_X, 0.5, _KEYS, 0)
    )
