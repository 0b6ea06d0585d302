"""Statistics of gates: additive sums that yield the mean and the standard deviation."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
    """Sums over rows of equal length, which can be added across devices or minibatches.

    Attributes:
        count: Number of rows.
        mean: Sum of the means of the rows.
        square: Sum of the mean squares of the rows.
    """

    count: jax.Array
    mean: jax.Array
    square: jax.Array


def moments_of(x: jax.Array) -> Moments:
    """Returns the moments of all elements of `x`, whose last axis is a row, without gradient.

    Rows are averaged first, since one long float32 sum would round small terms away.
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    means, squares = jnp.mean(x, axis=-1), jnp.mean(jnp.square(x), axis=-1)
    return Moments(jnp.float32(means.size), jnp.sum(means), jnp.sum(squares))


def sow_gate_moments(
    layer: nn.Module, igate: jax.Array, fgate: jax.Array, ogate: jax.Array
) -> None:
    """Sows the moments of a layer's gates as `gate_moments`; call it in a compact method.

    With the collection `intermediates` mutable, the layer's `gate_moments` is a dictionary from the
    argument names below to the `Moments` of the local gates over all tokens.

    Args:
        layer: The layer.
        igate: Pre-activations of the input gates, `(..., T)` or `(..., T, DH)`.
        fgate: Pre-activations of the forget gates, shaped like `igate`.
        ogate: Factor of the cell's output, of any shape.
    """
    if layer.is_mutable_collection("intermediates"):
        gates = {"igate": igate, "fgate": fgate, "ogate": ogate}
        moments = {name: moments_of(gate) for name, gate in gates.items()}
        layer.sow("intermediates", "gate_moments", moments)
