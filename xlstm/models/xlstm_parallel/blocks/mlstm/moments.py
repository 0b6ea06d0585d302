"""Sums over numbers of which their mean and deviation can be told, and which can be added."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
    """Sums over rows of equal length; those of parts, on several devices say, can be added.

    Attributes:
        count: Number of rows.
        mean: Sum of the rows' means.
        square: Sum of the rows' mean squares.
    """

    count: jax.Array
    mean: jax.Array
    square: jax.Array


def moments_of(x: jax.Array) -> Moments:
    """Returns the moments of all numbers in `x`, whose last axis has the rows; no gradient.

    A row's mean comes first: a float32 sum over very many numbers would lose the last ones.
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    means, squares = jnp.mean(x, axis=-1), jnp.mean(jnp.square(x), axis=-1)
    return Moments(jnp.float32(means.size), jnp.sum(means), jnp.sum(squares))
