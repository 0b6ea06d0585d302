"""Soft cap of pre-activations and logits."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bounds `x` smoothly to `(-cap, cap)` by `cap * tanh(x / cap)`; a cap of 0 bounds nothing."""
    return cap * jnp.tanh(x / cap) if cap else x
