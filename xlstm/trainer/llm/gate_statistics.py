"""What the gates of every block do: means and standard deviations over the tokens of a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.common_types import PyTree
from xlstm.models.shared.moments import Moments
from xlstm.models.xlstm_parallel.blocks.stack import block_groups, group_indices, local_repeats
from xlstm.models.xlstm_parallel.pattern import BlockPattern


def gate_moments(variables: PyTree, pattern: BlockPattern) -> dict[str, Moments]:
    """Takes the gates' moments from what the model has sown, inside of `shard_map`.

    Every token counts, with a target or without. Each device has its own heads, and the blocks of
    its stage: so the sums over all devices, and over minibatches, are those of the global batch.

    Args:
        variables: The model's mutable variables, with the collection `intermediates`.
        pattern: The model's pattern of blocks.

    Returns:
        Moments of the gates `igate`, `fgate` and `ogate`, see `sow_gate_moments`; each leaf has
        shape `(num_blocks,)`, with zeros for the blocks of other stages.
    """
    sown = variables["intermediates"]["blocks"]
    if pattern.is_uniform:
        sown = {name: sown for name in block_groups(pattern)}

    def place(numbers: jax.Array, sown: jax.Array) -> jax.Array:
        # Before the blocks a pipeline has an axis of micro-batches.
        here = jnp.sum(sown.reshape(-1, numbers.size), axis=0)
        blocks = jnp.zeros(pattern.length() * pattern.repeats, here.dtype)
        return blocks.at[numbers].set(here)

    placed = []
    for name, group in block_groups(pattern).items():
        (layer,) = sown[name].values()
        (moments,) = layer["gate_moments"]
        numbers = group_indices(pattern, group, local_repeats(pattern)).in_model.ravel()
        placed.append(jax.tree.map(functools.partial(place, numbers), moments))
    return jax.tree.map(lambda *groups: sum(groups), *placed)


def gate_scalars(moments: dict[str, Moments]) -> dict[str, float]:
    """Makes numbers to log of the moments of a step, on the host.

    Means and deviations are over tokens and heads, of `ogate` over tokens and features: of the
    input and forget gates' soft-capped pre-activations, and of how far the output gates are open,
    0 to 1 (in the block `xlstm_2024`, of the SiLU in their place). Sums are in float32: a deviation
    below a thousandth of its mean is rounding.

    Args:
        moments: What `gate_moments` returned, summed over the devices.

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
