"""Statistics of gates: sums of which mean and deviation can be told, and which can be added."""

from typing import NamedTuple

import flax.linen as nn
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


def sow_gate_moments(
    layer: nn.Module, igate: jax.Array, fgate: jax.Array, ogate: jax.Array
) -> None:
    """Sows the moments of a layer's gates, from its compact method.

    Whoever makes the collection `intermediates` mutable finds in it, as the layer's `gate_moments`,
    the `Moments` of this device's gates over all tokens, by the names of the arguments.

    Args:
        layer: The layer.
        igate: Pre-activations of the input gates, `(..., T)` or `(..., T, DH)`.
        fgate: Pre-activations of the forget gates, alike.
        ogate: What the cell's output is multiplied by, any shape.
    """
    if layer.is_mutable_collection("intermediates"):
        gates = {"igate": igate, "fgate": fgate, "ogate": ogate}
        moments = {name: moments_of(gate) for name, gate in gates.items()}
        layer.sow("intermediates", "gate_moments", moments)
