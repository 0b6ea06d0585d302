"""The kinds of blocks, by their names in the configuration's pattern."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PyTree
from xlstm.models.shared.convolution import ConvolutionalState
from xlstm.models.xlstm_parallel.blocks.mlstm.backend import config as mlstm
from xlstm.models.xlstm_parallel.blocks.mlstm.block import mLSTMBlock, mLSTMPreUpBlock
from xlstm.models.xlstm_parallel.blocks.slstm import cell as slstm
from xlstm.models.xlstm_parallel.blocks.slstm.block import sLSTMBlock
from xlstm.models.xlstm_parallel.config import ModelConfig


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
