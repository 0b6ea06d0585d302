"""Dropout with masks that do not depend on the mesh or on the number of minibatches."""

import jax
import jax.numpy as jnp

from xlstm.common_types import PRNGKeyArray


def token_keys(example_keys: PRNGKeyArray, num_tokens: int, first: jax.Array | int) -> PRNGKeyArray:
    """Derives a random key for each token from the keys of the examples.

    Args:
        example_keys: A key for each example, `(B, ...)`.
        num_tokens: `T`.
        first: Position of the first token in its sequence.

    Returns:
        Keys `(B, T, ...)`.
    """
    positions = first + jnp.arange(num_tokens)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(lambda key: fold_in(key, positions))(example_keys)


def dropout(
    x: jax.Array, rate: float, keys: PRNGKeyArray | None, site: jax.Array | int
) -> jax.Array:
    """Sets random elements to zero, and scales the others so that the mean is preserved.

    Each token has its own key, so the same elements are dropped on any mesh and in any minibatch.

    Args:
        x: Activations `(B, T, D)`.
        rate: Probability of dropping an element.
        keys: Random key for each token, `(B, T, ...)`; None for no dropout.
        site: Number of this dropout in the network; each has a different one.

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
