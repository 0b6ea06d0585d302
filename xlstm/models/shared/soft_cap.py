"""Soft cap of pre-activations and logits."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds `x` smoothly to `(-cap, cap)` by `cap * tanh(x / cap)`; None leaves it as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)
