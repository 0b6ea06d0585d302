"""The kinds of blocks, and what is carried from one to the next."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.models.shared.convolution import ConvolutionalState
from xlstm.models.shared.dropout import dropout
from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import LayerNorm, RMSNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.backend import inputs as mlstm
from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMLayer, mLSTMPreUpLayer
from xlstm.models.xlstm_parallel.blocks.slstm import cell as slstm
from xlstm.models.xlstm_parallel.blocks.slstm.layer import sLSTMLayer
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig


class BlockPlace(NamedTuple):
    """Where a block stands in the model; int32 scalars that count from 0.

    Attributes:
        number: Among all blocks.
        of_kind: Among the blocks of its kind.
    """

    number: jax.Array
    of_kind: jax.Array


class Stream(NamedTuple):
    """What goes from block to block, with the examples on the leading axis.

    Attributes:
        x: This device's tokens, `(B, T / tp, D)`.
        reset: Where the state is dropped before the token, bool `(B, T)`, or None.
        dropout_keys: A random key for each of this device's tokens, `(B, T / tp, ...)`, or None.
        padding: True for tokens that leave no trace in any state, bool `(B, T)`, or None. They are
            the last ones of an example.
        states: The states of all blocks before the first token, or None: for a block, those of its
            kind, leading axes `(number of these blocks, B)`. Each block replaces its own, in place
            where XLA can.
    """

    x: jax.Array
    reset: jax.Array | None = None
    dropout_keys: PRNGKeyArray | None = None
    padding: jax.Array | None = None
    states: PyTree | None = None

    def state_of(self, place: BlockPlace) -> PyTree | None:
        """The state of one block, without the axis of the blocks."""
        return jax.tree.map(
            lambda states: lax.dynamic_index_in_dim(states, place.of_kind, keepdims=False),
            self.states,
        )

    def after(self, place: BlockPlace, x: jax.Array, state: PyTree | None) -> "Stream":
        """What one block hands on: its output, and its state replaced."""
        states = jax.tree.map(
            lambda states, new: lax.dynamic_update_index_in_dim(states, new, place.of_kind, 0),
            self.states,
            state,
        )
        return self._replace(x=x, states=states)


class mLSTMBlock(nn.Module):
    """The block of xLSTM-7B: `x + mlstm_layer(norm_mlstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block.

        Args:
            stream: What came from the block before.
            place: Which block this is.

        Returns:
            What goes to the next block, and None, as a scan wants it.
        """
        config = self.config.model
        dtype, x = config.compute_dtype, stream.x
        # Site 0 is the embedding; every block has two.
        normed = RMSNorm(config.norm_eps, dtype, name="norm_mlstm")(x)
        layer = mLSTMLayer(self.config, name="mlstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        x = x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        normed = RMSNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        overlap = self.config.mesh.tp_overlap
        ffn = GatedFeedForward(
            config.ffn_dim,
            config.num_blocks,
            dtype,
            overlap,
            precision=config.precision,
            name="ffn",
        )
        x = x + dropout(ffn(normed), config.dropout, stream.dropout_keys, 2 * place.number + 2)
        return stream.after(place, x, state), None


class mLSTMPreUpBlock(nn.Module):
    """The mLSTM block of the 2024 paper: `x + mlstm_layer(norm_mlstm(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figures 3 and 11.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        normed = LayerNorm(config.norm_eps, config.compute_dtype, name="norm_mlstm")(stream.x)
        layer = mLSTMPreUpLayer(self.config, name="mlstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        x = stream.x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        return stream.after(place, x, state), None


class sLSTMBlock(nn.Module):
    """Post up-projection: `x + slstm_layer(norm_slstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figure 10.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        dtype, x = config.compute_dtype, stream.x
        normed = LayerNorm(config.norm_eps, dtype, name="norm_slstm")(x)
        layer = sLSTMLayer(self.config, name="slstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        # Site 0 is the embedding; every block has two.
        x = x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        normed = LayerNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        ffn = GatedFeedForward(
            config.slstm_ffn_dim,
            config.num_blocks,
            dtype,
            self.config.mesh.tp_overlap,
            nn.gelu,
            config.precision,
            name="ffn",
        )
        x = x + dropout(ffn(normed), config.dropout, stream.dropout_keys, 2 * place.number + 2)
        return stream.after(place, x, state), None


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """A kind of block, and the states of blocks of this kind.

    Attributes:
        block: The module's class.
        zero_state: Makes the state before a document, of a configuration and leading axes, such as
            `(number of blocks, B)`.
        state_specs: How these are cut over a mesh: partition specs, of the mesh axes that the rows
            are cut over, or None. Heads and their channels are cut over `tp`.
    """

    block: type[nn.Module]
    zero_state: Callable[[ModelConfig, tuple[int, ...]], PyTree]
    state_specs: Callable[[str | tuple[str, ...] | None], PyTree]


def _mlstm_state(model: ModelConfig, leading: tuple[int, ...]) -> mlstm.MLSTMState:
    qk_dim, v_dim = model.qk_dim // model.num_heads, model.v_dim // model.num_heads
    return mlstm.zero_state((*leading, model.num_heads), qk_dim, v_dim)


def _mlstm_specs(rows: str | tuple[str, ...] | None) -> mlstm.MLSTMState:
    return mlstm.MLSTMState(*[P(None, rows, "tp")] * len(mlstm.MLSTMState._fields))


def _slstm_state(model: ModelConfig, leading: tuple[int, ...]) -> slstm.SLSTMState:
    head_dim = model.embedding_dim // model.num_heads
    return slstm.zero_state((*leading, model.num_heads, head_dim))


def _slstm_specs(rows: str | tuple[str, ...] | None) -> slstm.SLSTMState:
    return slstm.SLSTMState(*[P(None, rows, "tp")] * len(slstm.SLSTMState._fields))


def _convolved_state(cell: PyTree, model: ModelConfig, leading: tuple[int, ...], channels: int):
    inputs = jnp.zeros((*leading, model.conv_width - 1, channels), jnp.float32)
    return ConvolutionalState(cell, inputs)


def _convolved_specs(cell: PyTree, rows: str | tuple[str, ...] | None) -> ConvolutionalState:
    return ConvolutionalState(cell, P(None, rows, None, "tp"))


KINDS = {
    "xlstm_7b": BlockKind(mLSTMBlock, _mlstm_state, _mlstm_specs),
    "xlstm_2024": BlockKind(
        mLSTMPreUpBlock,
        lambda model, leading: _convolved_state(
            _mlstm_state(model, leading), model, leading, model.inner_dim
        ),
        lambda rows: _convolved_specs(_mlstm_specs(rows), rows),
    ),
    "slstm": BlockKind(
        sLSTMBlock,
        lambda model, leading: _convolved_state(
            _slstm_state(model, leading), model, leading, model.embedding_dim
        ),
        lambda rows: _convolved_specs(_slstm_specs(rows), rows),
    ),
}
