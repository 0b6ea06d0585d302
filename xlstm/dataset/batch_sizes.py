"""How many rows each global batch has, and where in the endless order of rows it begins.

A run may begin with smaller batches and grow to `data.batch_size`. Both numbers are functions of
the configuration and the step alone, so that a run goes on from its step and nothing else.
"""

import dataclasses

from xlstm.dataset.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps, one behind the other, whose batches have the same size.

    Attributes:
        batch_size: Rows in each global batch.
        first_row: Rows in all batches before the phase.
        num_steps: How many steps it lasts; None: for ever.
    """

    batch_size: int
    first_row: int
    num_steps: int | None


def phases_from(config: DataConfig, step: int) -> list[Phase]:
    """Lists what is still to come of the batch sizes' ramp.

    Args:
        config: Its batch size and ramp.
        step: The step to begin with, counted from 0.

    Returns:
        The phases from `step` on, the one that it lies in cut to begin there; only the last has no
        end.

    Raises:
        ValueError: The step is negative.
    """
    if step < 0:
        raise ValueError(f"the step must not be negative, but is {step}")
    phases, row = [], 0
    for batch_size, num_steps in zip(config.ramp_batch_sizes, config.ramp_steps, strict=True):
        skipped = min(step, num_steps)
        if skipped < num_steps:
            first_row = row + skipped * batch_size
            phases.append(Phase(batch_size, first_row, num_steps - skipped))
        step -= skipped
        row += num_steps * batch_size
    return [*phases, Phase(config.batch_size, row + step * config.batch_size, None)]


def batch_size_at(config: DataConfig, step: int) -> int:
    """Returns the rows of the global batch of a step, counted from 0."""
    return phases_from(config, step)[0].batch_size


def rows_before(config: DataConfig, step: int) -> int:
    """Returns the rows of all global batches before that of a step, counted from 0."""
    return phases_from(config, step)[0].first_row


def rows_per_shard(batch_size: int, shard_index: int, shard_count: int) -> int:
    """Returns the rows of one share of a global batch.

    Args:
        batch_size: Rows in the global batch.
        shard_index: Which share.
        shard_count: How many equal shares there are.

    Raises:
        ValueError: There is no such share, or the shares cannot be equal.
    """
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} is not one of the {shard_count} shares")
    rows, rest = divmod(batch_size, shard_count)
    if rest:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {shard_count} shares: choose"
            f" multiples of {shard_count} for data.batch_size and data.ramp_batch_sizes"
        )
    return rows
