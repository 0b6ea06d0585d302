"""Causal convolution over time, of every channel by itself."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree
from xlstm.models.shared.linear import boxed_parameter, small_init


class ConvolutionalState(NamedTuple):
    """State, after a token, of a layer with a convolution before its cell.

    Attributes:
        cell: That of the cell.
        inputs: The convolution's last inputs, float32 `(B, W - 1, C)`.
    """

    cell: PyTree
    inputs: jax.Array


class CausalConvolution(nn.Module):
    """`y_t = bias + sum_j kernel_j x_(t - W + 1 + j)`, by channel; before the first token is zero.

    It is a sum of shifted products: XLA on CPU takes thirty times as long for a convolution with as
    many groups as channels.

    Attributes:
        width: Tokens that a token sees, itself included, W.
        dtype: Type of the computation and of the output.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        reset: jax.Array | None = None,
        padding: jax.Array | None = None,
        state: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves this device's channels, C.

        Args:
            x: `(B, T, C)`.
            reset: Tokens that do not see those before them, nor do later ones beyond, bool
                `(B, T)`, or None.
            padding: True for the last tokens of an example, which leave no trace in the state, bool
                `(B, T)`, or None.
            state: The last inputs before the first token, `(B, W - 1, C)`, or None for zeros.

        Returns:
            The output `(B, T, C)`, and the last inputs, like `state`, if that was given, else None.
            Of those inputs the ones from before the last reset are zero.
        """
        (_, time, channels), before = x.shape, self.width - 1
        shape, axes = (self.width, 1, channels), (None, None, "tp")
        kernel = boxed_parameter(self, "kernel", small_init(self.width), shape, axes)
        bias = boxed_parameter(self, "bias", nn.initializers.zeros, (channels,), ("tp",))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        if state is None:
            inputs = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
        else:
            inputs = jnp.concatenate([state.astype(self.dtype), x], axis=1)
        document = None
        if reset is not None:
            document = jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (before, 0)))
        y = bias.astype(self.dtype)
        for place in range(self.width):
            seen = inputs[:, place : place + time]
            if document is not None:
                is_same = document[:, place : place + time] == document[:, before:]
                seen = jnp.where(is_same[..., None], seen, 0)
            y = y + kernel[place] * seen
        if state is None:
            return y, None
        last = _last_before_padding(inputs, before, padding)
        if document is not None:
            documents = _last_before_padding(document, before, padding)
            last = jnp.where((documents == documents[:, -1:])[..., None], last, 0)
        return y, last.astype(state.dtype)


def _last_before_padding(x: jax.Array, count: int, padding: jax.Array | None) -> jax.Array:
    """The last `count` entries before the padding of `x (B, count + T, ...)`."""
    if padding is None:
        return x[:, x.shape[1] - count :]
    starts = jnp.sum(~padding, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count))(x, starts)
