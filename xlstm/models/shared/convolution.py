"""Depthwise causal convolution over time."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlstm.common_types import PyTree
from xlstm.distributed.context_parallel import INCOMING_STATE, from_earlier, of_last_part
from xlstm.distributed.mesh import axis_size
from xlstm.models.shared.linear import Axes, boxed_parameter, small_init


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

    Inputs before the first token are zero. If the tokens are sharded over `context_axis`, a part
    gets the last inputs of the part before it. The layer sums shifted products, since XLA on CPU
    takes thirty times as long for a convolution with as many groups as channels.

    Attributes:
        width: Number of tokens that each output depends on, W.
        dtype: Type of the computation and of the output.
        channel_axes: Mesh axes that the channels are sharded over.
        context_axis: Mesh axis that the tokens of `x` are sharded over; None if they are not.
    """

    width: int
    dtype: jnp.dtype = jnp.float32
    channel_axes: Axes = "tp"
    context_axis: str | None = None

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

        Raises:
            ValueError: If a part of a sequence has fewer than `W - 1` tokens.
        """
        (_, time, channels), before = x.shape, self.width - 1
        shape, axes = (self.width, 1, channels), (None, None, self.channel_axes)
        kernel = boxed_parameter(self, "kernel", small_init(self.width), shape, axes)
        bias = boxed_parameter(
            self, "bias", nn.initializers.zeros, (channels,), (self.channel_axes,)
        )
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        document = None
        if reset is not None:
            document = jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (before, 0)))
        first = None if state is None else state.astype(self.dtype)
        if before and self.context_axis and axis_size(self.context_axis) > 1:
            first = self._from_earlier_part(x, first, document)
        if first is None:
            inputs = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
        else:
            inputs = jnp.concatenate([first, x], axis=1)
        y = bias.astype(self.dtype)
        for offset in range(self.width):
            seen = inputs[:, offset : offset + time]
            if document is not None:
                is_same = document[:, offset : offset + time] == document[:, before:]
                seen = jnp.where(is_same[..., None], seen, 0)
            y = y + kernel[offset] * seen
        if state is None:
            return y, None
        last = _last_inputs(inputs, document, before, padding)
        if self.context_axis:
            last = of_last_part(last, self.context_axis)
        return y, last.astype(state.dtype)

    def _from_earlier_part(
        self, x: jax.Array, first: jax.Array | None, document: jax.Array | None
    ) -> jax.Array:
        """Returns the last inputs of the part before this one; `first`, or zeros, in the first."""
        before = self.width - 1
        if x.shape[1] < before:
            raise ValueError(
                f"a part of a sequence has {x.shape[1]} tokens, fewer than the {before} before a"
                f" token that a convolution of width {self.width} reads"
            )
        last = _last_inputs(x, document, before, None)
        fill = jnp.zeros_like(last) if first is None else first
        return checkpoint_name(from_earlier(last, fill, self.context_axis), INCOMING_STATE)


def _last_inputs(
    inputs: jax.Array, document: jax.Array | None, count: int, padding: jax.Array | None
) -> jax.Array:
    """Returns the last `count` inputs before the padding; those of earlier documents are zero."""
    last = _last_before_padding(inputs, count, padding)
    if document is None:
        return last
    documents = _last_before_padding(document, count, padding)
    return jnp.where((documents == documents[:, -1:])[..., None], last, 0)


def _last_before_padding(x: jax.Array, count: int, padding: jax.Array | None) -> jax.Array:
    """Returns the last `count` entries before the padding of `x (B, count + T, ...)`."""
    if padding is None:
        return x[:, x.shape[1] - count :]
    starts = jnp.sum(~padding, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count))(x, starts)
