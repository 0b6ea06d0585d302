"""Batches of token windows, and the batch size of each step."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from xlstm.dataset.config import DataConfig


@flax.struct.dataclass
class Batch:
    """Rows of tokens, with what the loss and the model need to know about each token.

    Rows from a token store are packed: a row may start in the middle of a document and may hold
    several consecutive documents, without padding.

    Attributes:
        inputs: `(B, T)` int32, the tokens that the model reads.
        targets: `(B, T)` int32, the token that follows each input.
        targets_mask: `(B, T)` bool, True where the target counts in the loss.
        reset: `(B, T)` bool, True where the input is the first token of a document: the model
            resets its state before it reads that token.
        positions: `(B, T)` int32, the index of each target in its document, where 0 is the first
            token; the first token of the next document has the number of tokens of the document.
            0 in padding. Only validation sets of whole documents have positions.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    targets_mask: np.ndarray | jax.Array
    reset: np.ndarray | jax.Array
    positions: np.ndarray | jax.Array | None = None


def full_batch(windows: np.ndarray, bos_id: int) -> Batch:
    """Returns the batch of some full windows.

    Args:
        windows: `(B, T + 1)` int32.
        bos_id: The marker at the start of every document.

    Returns:
        The batch, in NumPy arrays `(B, T)`.
    """
    inputs = np.ascontiguousarray(windows[:, :-1])
    return Batch(
        inputs=inputs,
        targets=np.ascontiguousarray(windows[:, 1:]),
        targets_mask=np.ones(inputs.shape, bool),
        reset=inputs == bos_id,
    )


def padded_batch(windows: Sequence[np.ndarray], shape: tuple[int, int], bos_id: int) -> Batch:
    """Returns the batch of some windows, padded where windows are short or missing.

    Args:
        windows: At most `B` windows of at most `T + 1` tokens.
        shape: `(B, T + 1)`.
        bos_id: The marker at the start of every document; it is also the padding.

    Returns:
        The batch, in NumPy arrays `(B, T)`; the mask is False at padding.
    """
    padded = np.full(shape, bos_id, np.int32)
    present = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        padded[row, : window.size] = window
        present[row, : window.size] = True
    return full_batch(padded, bos_id).replace(targets_mask=present[:, 1:])


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive steps whose batches have the same size.

    Attributes:
        batch_size: Rows in each global batch.
        first_row: Rows in all batches before the phase.
        num_steps: The length of the phase; None if it has no end.
    """

    batch_size: int
    first_row: int
    num_steps: int | None


def remaining_phases(config: DataConfig, step: int) -> list[Phase]:
    """Returns the phases of the batch-size ramp from a step on.

    Args:
        config: The batch size and its ramp.
        step: The first step, counted from 0.

    Returns:
        The phases in order. The first one starts at `step`, the last one has no end.

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
    """Returns the number of rows in all global batches before a step, counted from 0."""
    return remaining_phases(config, step)[0].first_row


def rows_per_shard(batch_size: int, shard_index: int, shard_count: int) -> int:
    """Returns the number of rows in one shard of a global batch.

    Args:
        batch_size: Rows in the global batch.
        shard_index: The shard, counted from 0.
        shard_count: The number of equal shards.

    Raises:
        ValueError: There is no such shard, or the shards cannot be equal.
    """
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index}: expected one from 0 to {shard_count - 1}")
    rows, rest = divmod(batch_size, shard_count)
    if rest:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {shard_count} shards: choose"
            f" multiples of {shard_count} for data.batch_size and data.ramp_batch_sizes"
        )
    return rows
