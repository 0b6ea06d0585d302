"""The kinds of blocks, and the carry that passes from one block to the next."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.distributed.mesh import TOKEN_AXES
from xlstm.models.shared.convolution import ConvolutionalState
from xlstm.models.shared.dropout import dropout
from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import LayerNorm, RMSNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.backend import inputs as mlstm
from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMLayer, mLSTMPreUpLayer
from xlstm.models.xlstm_parallel.blocks.slstm import cell as slstm
from xlstm.models.xlstm_parallel.blocks.slstm.layer import sLSTMLayer
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig

# The Flax collection of the states that training carries from batch to batch. Each block has its
# own, `state`, with the leading axis `B`, and replaces it.
CARRIED_STATE = "carried_state"


class BlockIndex(NamedTuple):
    """Index of a block, as int32 scalars that count from 0.

    Attributes:
        in_model: Index among all blocks of the model.
        of_kind: Index among the blocks of its kind.
    """

    in_model: jax.Array
    of_kind: jax.Array


class BlockCarry(NamedTuple):
    """Carry of the scan over blocks, with the examples on the leading axis.

    `xlstm.common_types` describes `x`, `reset` and `padding`.

    Attributes:
        x: Local tokens `(B, T / tp, D)`.
        reset: Where documents start, bool `(B, T)`, or None.
        dropout_keys: A random key for each local token, `(B, T / tp, ...)`, or None.
        padding: Which tokens do not change any state, bool `(B, T)`, or None.
        states: States of all blocks before the first token, or None. A block gets those of its
            kind, with leading axes `(number of blocks of the kind, B)`, and replaces its own, in
            place where XLA can.
        rows: Index of each example in the states of `CARRIED_STATE`, int32 `(B,)`; None if they
            hold the same examples.
    """

    x: jax.Array
    reset: jax.Array | None = None
    dropout_keys: PRNGKeyArray | None = None
    padding: jax.Array | None = None
    states: PyTree | None = None
    rows: jax.Array | None = None

    def state_of(self, index: BlockIndex) -> PyTree | None:
        """Returns the state of one block, without the axis of blocks."""
        return jax.tree.map(
            lambda states: lax.dynamic_index_in_dim(states, index.of_kind, keepdims=False),
            self.states,
        )

    def with_state_of(self, index: BlockIndex, state: PyTree | None) -> "BlockCarry":
        """Returns the carry with a new state of one block."""
        states = jax.tree.map(
            lambda states, new: lax.dynamic_update_index_in_dim(states, new, index.of_kind, 0),
            self.states,
            state,
        )
        return self._replace(states=states)


def _run_layer(
    block: nn.Module, layer: nn.Module, x: jax.Array, carry: BlockCarry, index: BlockIndex
) -> tuple[jax.Array, BlockCarry]:
    """Runs the layer of a block that has a state.

    Args:
        block: The block.
        layer: Its layer.
        x: Normalized local tokens `(B, T / tp, D)`.
        carry: Carry from the previous block.
        index: Index of the block.

    Returns:
        The output of the layer, and the carry with the block's new state.
    """
    if not block.has_variable(CARRIED_STATE, "state"):
        y, state = layer(x, carry.reset, carry.padding, carry.state_of(index))
        return y, carry.with_state_of(index, state)
    carried = block.variable(CARRIED_STATE, "state")
    y, state = layer(x, carry.reset, carry.padding, carried.value)
    # Gradients end at the batch: truncated back-propagation through time.
    carried.value = lax.stop_gradient(state)
    return y, carry


class mLSTMBlock(nn.Module):
    """Block of xLSTM-7B: `x + mlstm_layer(norm_mlstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, carry: BlockCarry, index: BlockIndex) -> tuple[BlockCarry, None]:
        """Runs the block.

        Args:
            carry: Carry from the previous block.
            index: Index of this block.

        Returns:
            The carry for the next block, and None, the output that a scan requires.
        """
        config = self.config.model
        dtype, x = config.compute_dtype, carry.x
        # Dropout site 0 is the embedding; each block has two sites.
        normed = RMSNorm(config.norm_eps, dtype, name="norm_mlstm")(x)
        y, carry = _run_layer(
            self, mLSTMLayer(self.config, name="mlstm_layer"), normed, carry, index
        )
        x = x + dropout(y, config.dropout, carry.dropout_keys, 2 * index.in_model + 1)
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
        x = x + dropout(ffn(normed), config.dropout, carry.dropout_keys, 2 * index.in_model + 2)
        return carry._replace(x=x), None


class mLSTMPreUpBlock(nn.Module):
    """mLSTM block of the 2024 paper: `x + mlstm_layer(norm_mlstm(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figures 3 and 11.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, carry: BlockCarry, index: BlockIndex) -> tuple[BlockCarry, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        normed = LayerNorm(config.norm_eps, config.compute_dtype, name="norm_mlstm")(carry.x)
        y, carry = _run_layer(
            self, mLSTMPreUpLayer(self.config, name="mlstm_layer"), normed, carry, index
        )
        x = carry.x + dropout(y, config.dropout, carry.dropout_keys, 2 * index.in_model + 1)
        return carry._replace(x=x), None


class sLSTMBlock(nn.Module):
    """sLSTM block: `x + slstm_layer(norm_slstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figure 10.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, carry: BlockCarry, index: BlockIndex) -> tuple[BlockCarry, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        dtype, x = config.compute_dtype, carry.x
        normed = LayerNorm(config.norm_eps, dtype, name="norm_slstm")(x)
        y, carry = _run_layer(
            self, sLSTMLayer(self.config, name="slstm_layer"), normed, carry, index
        )
        x = x + dropout(y, config.dropout, carry.dropout_keys, 2 * index.in_model + 1)
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
        x = x + dropout(ffn(normed), config.dropout, carry.dropout_keys, 2 * index.in_model + 2)
        return carry._replace(x=x), None


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """A kind of block and the states of its blocks.

    Attributes:
        block: Module class of the block.
        zero_state: Function of a configuration and leading axes, such as `(number of blocks, B)`,
            that returns the state before a document.
        state_specs: Function that returns the partition specs of states; its argument is the mesh
            axes that the rows are sharded over, or None. Heads and their channels are sharded over
            `tp`, those of sLSTM blocks also over `cp`.
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
    return slstm.SLSTMState(*[P(None, rows, TOKEN_AXES)] * len(slstm.SLSTMState._fields))


def _convolved_state(cell: PyTree, model: ModelConfig, leading: tuple[int, ...], channels: int):
    inputs = jnp.zeros((*leading, model.conv_width - 1, channels), jnp.float32)
    return ConvolutionalState(cell, inputs)


def _convolved_specs(
    cell: PyTree, rows: str | tuple[str, ...] | None, channels: str | tuple[str, ...]
) -> ConvolutionalState:
    return ConvolutionalState(cell, P(None, rows, None, channels))


# The kinds of blocks by their names in a configuration.
KINDS = {
    "xlstm_7b": BlockKind(mLSTMBlock, _mlstm_state, _mlstm_specs),
    "xlstm_2024": BlockKind(
        mLSTMPreUpBlock,
        lambda model, leading: _convolved_state(
            _mlstm_state(model, leading), model, leading, model.inner_dim
        ),
        lambda rows: _convolved_specs(_mlstm_specs(rows), rows, "tp"),
    ),
    "slstm": BlockKind(
        sLSTMBlock,
        lambda model, leading: _convolved_state(
            _slstm_state(model, leading), model, leading, model.embedding_dim
        ),
        lambda rows: _convolved_specs(_slstm_specs(rows), rows, TOKEN_AXES),
    ),
}
