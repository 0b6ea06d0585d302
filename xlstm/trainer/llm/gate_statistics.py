"""Statistics of the gates of every block: means and standard deviations over a step's tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.common_types import PyTree
from xlstm.models.shared.moments import Moments
from xlstm.models.xlstm_parallel.blocks.stack import block_groups, group_indices, local_repeats
from xlstm.models.xlstm_parallel.pattern import BlockPattern


def gate_moments(variables: PyTree, pattern: BlockPattern) -> dict[str, Moments]:
    """Returns the gates' moments that the model has sown, inside `shard_map`.

    Every token counts, with or without a target. Each device has its own tokens, heads and stage,
    so summing the moments over devices and minibatches gives those of the global batch.

    Args:
        variables: The model's mutable variables, with the collection `intermediates`.
        pattern: The model's pattern of blocks.

    Returns:
        Moments of the gates `igate`, `fgate` and `ogate`, see `sow_gate_moments`. Each leaf has
        shape `(num_blocks,)`, with zeros for the blocks of other stages.
    """
    sown = variables["intermediates"]["blocks"]
    if pattern.is_uniform:
        sown = {name: sown for name in block_groups(pattern)}

    def scatter_to_blocks(indices: jax.Array, sown: jax.Array) -> jax.Array:
        # A pipeline adds a leading axis of micro-batches.
        local = jnp.sum(sown.reshape(-1, indices.size), axis=0)
        blocks = jnp.zeros(pattern.length() * pattern.repeats, local.dtype)
        return blocks.at[indices].set(local)

    moments_of_groups = []
    for name, group in block_groups(pattern).items():
        (layer,) = sown[name].values()
        (moments,) = layer["gate_moments"]
        indices = group_indices(pattern, group, local_repeats(pattern)).in_model.ravel()
        moments_of_groups.append(
            jax.tree.map(functools.partial(scatter_to_blocks, indices), moments)
        )
    return jax.tree.map(lambda *groups: sum(groups), *moments_of_groups)


def gate_scalars(moments: dict[str, Moments]) -> dict[str, float]:
    """Converts the moments of a step to numbers to log, on the host.

    For input and forget gates these are the mean and the standard deviation of the soft-capped
    pre-activations, over tokens and heads. For output gates they are those of the sigmoid, from 0
    to 1, over tokens and features (in the block `xlstm_2024`, of the SiLU that replaces it). Sums
    are in float32: a deviation below a thousandth of its mean is rounding.

    Args:
        moments: Result of `gate_moments`, summed over the devices.

    Returns:
        For each block, counted from 0, `igate_mean/0`, `igate_std/0`, and so on for every gate.
    """
    row = {}
    for gate, sums in moments.items():
        count, total, square = (np.asarray(leaf, np.float64) for leaf in sums)
        mean = total / count
        std = np.sqrt(np.maximum(square / count - mean**2, 0))
        for block in range(len(mean)):
            row[f"{gate}_mean/{block}"] = float(mean[block])
            row[f"{gate}_std/{block}"] = float(std[block])
    return row
