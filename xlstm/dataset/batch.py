"""A batch, and how large each one of a run is."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from xlstm.dataset.config import DataConfig


@flax.struct.dataclass
class Batch:
    """Some rows of token windows, with what the loss and the model need to know of each token.

    The rows come packed from a token store: a row may begin in the middle of a document and may
    hold several documents, one behind the other, without padding.

    Attributes:
        inputs: `(B, T)` int32, the tokens that the model reads.
        targets: `(B, T)` int32, for each input the token that follows it.
        targets_mask: `(B, T)` bool, True where the target counts in the loss.
        reset: `(B, T)` bool, True where the input is the first token of a document: the model
            drops its state before it reads that token.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    targets_mask: np.ndarray | jax.Array
    reset: np.ndarray | jax.Array


def full_batch(windows: np.ndarray, bos_id: int) -> Batch:
    """Turns full windows into a batch.

    Args:
        windows: `(B, T + 1)` int32.
        bos_id: The marker that every document begins with.

    Returns:
        The batch of NumPy arrays `(B, T)`.
    """
    inputs = np.ascontiguousarray(windows[:, :-1])
    return Batch(
        inputs=inputs,
        targets=np.ascontiguousarray(windows[:, 1:]),
        targets_mask=np.ones(inputs.shape, bool),
        reset=inputs == bos_id,
    )


def padded_batch(windows: Sequence[np.ndarray], shape: tuple[int, int], bos_id: int) -> Batch:
    """Turns windows, some perhaps short or missing, into a batch.

    Args:
        windows: At most `B` of at most `T + 1` tokens.
        shape: `(B, T + 1)`.
        bos_id: The marker that every document begins with; it fills the places without a token.

    Returns:
        The batch of NumPy arrays `(B, T)`, its mask False where there is no token.
    """
    padded = np.full(shape, bos_id, np.int32)
    present = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        padded[row, : window.size] = window
        present[row, : window.size] = True
    return full_batch(padded, bos_id).replace(targets_mask=present[:, 1:])


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
