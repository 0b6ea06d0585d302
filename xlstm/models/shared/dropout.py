"""Dropout whose masks do not depend on how the work is divided."""

import jax
import jax.numpy as jnp

from xlstm.common_types import PRNGKeyArray


def token_keys(example_keys: PRNGKeyArray, num_tokens: int, first: jax.Array | int) -> PRNGKeyArray:
    """Derives a random key for every token from those of the examples.

    Args:
        example_keys: A key for each example, `(B, ...)`.
        num_tokens: `T`.
        first: Place of the first token in its sequence.

    Returns:
        Keys `(B, T, ...)`.
    """
    places = first + jnp.arange(num_tokens)
    return jax.vmap(lambda key: jax.vmap(lambda place: jax.random.fold_in(key, place))(places))(
        example_keys
    )


def dropout(
    x: jax.Array, rate: float, keys: PRNGKeyArray | None, site: jax.Array | int
) -> jax.Array:
    """Drops elements at random, and scales up the others so that the mean stays.

    Every token has a key of its own: on any mesh, in any minibatch, the same elements are dropped.

    Args:
        x: `(B, T, D)`.
        rate: Probability with which an element is dropped.
        keys: A key for each token, `(B, T, ...)`; None for no dropout.
        site: Number that differs wherever in the network dropout is applied.

    Returns:
        An array like `x`.

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        2014.
    """
    if keys is None or rate == 0:
        return x

    def draw(key: PRNGKeyArray) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[-1:])

    keep = jax.vmap(jax.vmap(draw))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
