"""Normalization layers, which reduce in float32 whatever the compute type."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.models.shared.linear import Axes, boxed_parameter


class RMSNorm(nn.Module):
    """RMS norm: division by the root mean square over the last axis, then a weight.

    Attributes:
        eps: Added to the mean square.
        dtype: Type of the output.

    References:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., D)` to `(..., D)`."""
        scale = boxed_parameter(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with a weight and without a bias.

    Attributes:
        eps: Added to the variance.
        dtype: Type of the output.

    References:
        Ba et al., "Layer Normalization", 2016, eq. 4.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., D)` to `(..., D)`."""
        scale = boxed_parameter(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        return (_standardized(x, self.eps) * scale).astype(self.dtype)


class MultiHeadLayerNorm(nn.Module):
    """Layer norm over the channels of each head, with a weight and without a bias.

    Attributes:
        eps: Added to the variance.
        dtype: Type of the output.
        head_axes: Mesh axes that the heads are sharded over.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    head_axes: Axes = "tp"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps local heads, `(B, NH, T, DHV)`, to `(B, T, NH * DHV)`."""
        batch, num_heads, time, head_dim = x.shape
        scale = boxed_parameter(
            self, "scale", nn.initializers.ones, (num_heads * head_dim,), (self.head_axes,)
        )
        normed = _standardized(x, self.eps)
        joined = normed.swapaxes(1, 2).reshape(batch, time, num_heads * head_dim)
        return (joined * scale).astype(self.dtype)


def _standardized(x: jax.Array, eps: float) -> jax.Array:
    """Returns `x` with mean 0 and variance 1 over the last axis, float32."""
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + eps)
