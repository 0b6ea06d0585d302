"""The residual block of xLSTM-7B: an mLSTM layer, then a gated feed-forward layer."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax import lax

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.models.shared.dropout import dropout
from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import RMSNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMLayer
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class Stream(NamedTuple):
    """What goes from block to block, with the examples on the leading axis.

    Attributes:
        x: This device's tokens, `(B, T / tp, D)`.
        reset: Where the state is dropped before the token, bool `(B, T)`, or None.
        dropout_keys: A random key for each of this device's tokens, `(B, T / tp, ...)`, or None.
        padding: True for tokens that leave no trace in any state, bool `(B, T)`, or None. They are
            the last ones of an example.
        states: The states of all blocks before the first token, leading axes `(num_blocks, B, NH)`,
            or None. Each block replaces its own, in place where XLA can.
    """

    x: jax.Array
    reset: jax.Array | None = None
    dropout_keys: PRNGKeyArray | None = None
    padding: jax.Array | None = None
    states: PyTree | None = None

    def state_of(self, number: jax.Array) -> PyTree | None:
        """The state of one block, without the axis of the blocks."""
        return jax.tree.map(
            lambda states: lax.dynamic_index_in_dim(states, number, keepdims=False), self.states
        )

    def after(self, number: jax.Array, x: jax.Array, state: PyTree | None) -> "Stream":
        """What one block hands on: its output, and its state replaced."""
        states = jax.tree.map(
            lambda states, new: lax.dynamic_update_index_in_dim(states, new, number, 0),
            self.states,
            state,
        )
        return self._replace(x=x, states=states)


class mLSTMBlock(nn.Module):
    """`x + mlstm_layer(norm_mlstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, number: jax.Array) -> tuple[Stream, None]:
        """Runs the block.

        Args:
            stream: What came from the block before.
            number: Which block this is, counted from 0; an int32 scalar.

        Returns:
            What goes to the next block, and None, as a scan wants it.
        """
        config = self.config.model
        dtype, x = config.compute_dtype, stream.x
        # Site 0 is the embedding.
        normed = RMSNorm(config.norm_eps, dtype, name="norm_mlstm")(x)
        layer = mLSTMLayer(self.config, name="mlstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(number))
        x = x + dropout(y, config.dropout, stream.dropout_keys, 2 * number + 1)
        normed = RMSNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        overlap = self.config.mesh.tp_overlap
        ffn = GatedFeedForward(config.ffn_dim, config.num_blocks, dtype, overlap, name="ffn")
        x = x + dropout(ffn(normed), config.dropout, stream.dropout_keys, 2 * number + 2)
        return stream.after(number, x, state), None
