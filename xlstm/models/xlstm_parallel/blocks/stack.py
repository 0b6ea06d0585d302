"""The stack of all blocks in a model, or in a pipeline stage, as a scan.

If all blocks are of one kind, one scan runs them, and their parameters have a leading axis of
blocks. If kinds alternate, the scan runs over the repetitions of the pattern, with an inner scan
for each group of blocks of one kind. Each group has its own parameters, whose leading axis counts
its blocks in all repetitions. The compiled program thus grows with the pattern, not with the depth.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PyTree
from xlstm.distributed.context_parallel import INCOMING_STATE
from xlstm.distributed.data_parallel import is_partitioned
from xlstm.distributed.mesh import axis_index, axis_size
from xlstm.distributed.tensor_parallel import SCATTERED
from xlstm.models.xlstm_parallel.blocks.block import (
    CARRIED_STATE,
    KINDS,
    BlockCarry,
    BlockIndex,
)
from xlstm.models.xlstm_parallel.blocks.slstm.cell import RESIDUALS
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.pattern import BlockGroup, BlockPattern

# The collections whose arrays have a leading axis of blocks.
_STACKED = ("params", "intermediates", CARRIED_STATE)
# Wraps the class of a block, for example to gather its parameters.
Wrapper = Callable[[type[nn.Module]], type[nn.Module]]


def block_stack(config: LanguageModelConfig, wrap: Wrapper) -> type[nn.Module]:
    """Creates the module class of all local blocks.

    Args:
        config: Configuration of the model.
        wrap: Function that is applied to the class of each block.

    Returns:
        A class whose modules are created with `config`, called with a `BlockCarry` and the
        `stack_indices`, and return the carry after the last block, and None.
    """
    model = config.model
    pattern = model.pattern
    repeats = pattern.repeats // axis_size("pp")

    def scan(target: type[nn.Module], length: int, axis: str | None, unroll: int = 1):
        return nn.scan(
            target,
            variable_axes=dict.fromkeys(_STACKED, 0),
            split_rngs={"params": True},
            length=length,
            unroll=min(unroll, length),
            metadata_params={nn.PARTITION_NAME: axis},
        )

    def of_kind(kind: str) -> type[nn.Module]:
        return _rematerialized(wrap(KINDS[kind].block), model.remat)

    if pattern.is_uniform:
        return scan(of_kind(pattern.groups[0].kind), repeats, "pp", model.scan_unroll)

    class Repetition(nn.Module):
        """One repetition of the pattern."""

        config: LanguageModelConfig

        @nn.compact
        def __call__(self, carry: BlockCarry, repeat: jax.Array) -> tuple[BlockCarry, None]:
            states = carry.states
            for name, group in block_groups(pattern).items():
                blocks = scan(of_kind(group.kind), group.length, None, model.scan_unroll)
                if states is not None:
                    carry = carry._replace(states=states[group.kind])
                indices = group_indices(pattern, group, repeat)
                carry, _ = blocks(self.config, name=name)(carry, indices)
                if states is not None:
                    states = states | {group.kind: carry.states}
            return carry._replace(states=states), None

    lengths = {name: group.length for name, group in block_groups(pattern).items()}
    return nn.map_variables(
        scan(Repetition, repeats, "pp"),
        _STACKED,
        lambda variables: {
            collection: {name: _split_repeats(tree, lengths[name]) for name, tree in groups.items()}
            for collection, groups in variables.items()
        },
        lambda variables: jax.tree.map(_merge_repeats, variables, is_leaf=is_partitioned),
        mutable=True,
    )


def stack_indices(pattern: BlockPattern) -> PyTree:
    """Returns the inputs that `block_stack` scans over on this device.

    Args:
        pattern: Pattern of the model.

    Returns:
        Indices of the blocks if they are of one kind, else indices of the repetitions.
    """
    repeats = local_repeats(pattern)
    return BlockIndex(repeats, repeats) if pattern.is_uniform else repeats


def local_repeats(pattern: BlockPattern) -> jax.Array:
    """Returns the indices of this stage's repetitions of the pattern, int32 `(repeats / pp,)`."""
    count = pattern.repeats // axis_size("pp")
    return axis_index("pp") * count + jnp.arange(count)


def block_groups(pattern: BlockPattern) -> dict[str, BlockGroup]:
    """Returns the groups of a pattern by the names of their parameters."""
    return {f"{index}_{group.kind}": group for index, group in enumerate(pattern.groups)}


def group_indices(pattern: BlockPattern, group: BlockGroup, repeats: jax.Array) -> BlockIndex:
    """Returns the indices of a group's blocks in some repetitions of the pattern.

    Args:
        pattern: Pattern of the model.
        group: Group of the pattern.
        repeats: Indices of the repetitions, `(...)`.

    Returns:
        Arrays `(..., group.length)`.
    """
    repeats, blocks = repeats[..., None], jnp.arange(group.length)
    return BlockIndex(
        repeats * pattern.length() + group.first + blocks,
        repeats * pattern.length(group.kind) + group.first_of_kind + blocks,
    )


def carried_state(model: ModelConfig, batch_size: int) -> PyTree:
    """Returns the states to carry from batch to batch, before the first document.

    Args:
        model: Configuration of the model.
        batch_size: `B`.

    Returns:
        The variables of the collection `CARRIED_STATE` for all blocks: zero states with leading
        axes `(blocks of a group, B)`.
    """
    pattern = model.pattern
    return _variables_of_groups(
        pattern,
        lambda group: KINDS[group.kind].zero_state(
            model, (pattern.repeats * group.length, batch_size)
        ),
    )


def carried_state_specs(pattern: BlockPattern, rows: tuple[str, ...]) -> PyTree:
    """Returns the partition specs of `carried_state`, with the rows sharded over some mesh axes."""

    def specs(group: BlockGroup) -> PyTree:
        of_kind = KINDS[group.kind].state_specs(rows)
        return jax.tree.map(lambda spec: P("pp", *spec[1:]), of_kind)

    return _variables_of_groups(pattern, specs)


def _variables_of_groups(pattern: BlockPattern, state_of: Callable[[BlockGroup], PyTree]) -> PyTree:
    """Returns variables named `state`, as the blocks of each group of a pattern have them."""
    groups = {name: {"state": state_of(g)} for name, g in block_groups(pattern).items()}
    return {"blocks": next(iter(groups.values())) if pattern.is_uniform else groups}


def _split_repeats(tree: PyTree, length: int) -> PyTree:
    """Splits the leading axis of arrays and boxes into repetitions and blocks of a group."""

    def split(leaf: PyTree) -> PyTree:
        if not is_partitioned(leaf):
            return leaf.reshape(-1, length, *leaf.shape[1:])
        names = (leaf.names[0], None, *leaf.names[1:])
        return leaf.replace(value=split(leaf.value), names=names)

    return jax.tree.map(split, tree, is_leaf=is_partitioned)


def _merge_repeats(leaf: PyTree) -> PyTree:
    """Merges the two axes again."""
    if not is_partitioned(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])
    return leaf.replace(value=_merge_repeats(leaf.value), names=(leaf.names[0], *leaf.names[2:]))


def _rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """Returns the block with the rematerialization that `model.remat` names."""
    if remat == "none":
        return block
    policies = {
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(SCATTERED, RESIDUALS, INCOMING_STATE),
        ),
        "block": jax.checkpoint_policies.nothing_saveable,
    }
    # The scan around the block already prevents XLA from merging the two computations.
    return nn.remat(block, policy=policies[remat], prevent_cse=False)
