"""Depthwise causal convolution over time."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree
from xlstm.models.shared.linear import boxed_parameter, small_init


class ConvolutionalState(NamedTuple):
    """State of a layer with a convolution in front of its cell.

    Attributes:
        cell: State of the cell.
        inputs: Last inputs of the convolution, float32 `(B, W - 1, C)`.
    """

    cell: PyTree
    inputs: jax.Array


class CausalConvolution(nn.Module):
    """Depthwise convolution: `y_t = bias + sum_j kernel_j x_(t - W + 1 + j)` for each channel.

    Inputs before the first token are zero. The layer sums shifted products, since XLA on CPU takes
    thirty times as long for a convolution with as many groups as channels.

    Attributes:
        width: Number of tokens that each output depends on, W.
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
        """Convolves local channels; `xlstm.common_types` describes the arguments.

        Args:
            x: Inputs `(B, T, C)`.
            reset: Where documents start: no output depends on inputs of earlier documents.
            padding: Which tokens do not change the state.
            state: The last inputs before the first token, `(B, W - 1, C)`, or None for zeros.

        Returns:
            The output `(B, T, C)`, and the last inputs, shaped like `state`, or None if no state
            was given. Those of earlier documents are zero.
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
        for offset in range(self.width):
            seen = inputs[:, offset : offset + time]
            if document is not None:
                is_same = document[:, offset : offset + time] == document[:, before:]
                seen = jnp.where(is_same[..., None], seen, 0)
            y = y + kernel[offset] * seen
        if state is None:
            return y, None
        last = _last_before_padding(inputs, before, padding)
        if document is not None:
            documents = _last_before_padding(document, before, padding)
            last = jnp.where((documents == documents[:, -1:])[..., None], last, 0)
        return y, last.astype(state.dtype)


def _last_before_padding(x: jax.Array, count: int, padding: jax.Array | None) -> jax.Array:
    """Returns the last `count` entries before the padding of `x (B, count + T, ...)`."""
    if padding is None:
        return x[:, x.shape[1] - count :]
    starts = jnp.sum(~padding, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count))(x, starts)
