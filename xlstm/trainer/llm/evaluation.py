"""Evaluation of parameters on validation sets."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from xlstm.common_types import Metrics, PyTree
from xlstm.dataset.task_data import TaskValidationSet
from xlstm.dataset.validation import ValidationSet
from xlstm.trainer.base.train_step import create_eval_step
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.data import global_batches, process_shard
from xlstm.trainer.llm.loss import eval_sums
from xlstm.trainer.llm.position_groups import group_range


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """Loss of the targets at some positions in their documents.

    Attributes:
        first: First position; the token after the start of a document has position 1.
        last: Last position.
        loss: Mean negative log-likelihood, in nats.
        count: Number of targets.
    """

    first: int
    last: int
    loss: float
    count: int


class DivergedError(ValueError):
    """Error for a validation loss that is not finite."""


def create_evaluation(
    mesh: Mesh,
    params_specs: PyTree,
    apply_fn: Callable,
    sets: Sequence[ValidationSet | TaskValidationSet],
    max_batches: int | None,
    on_batch: Callable[[], None] = lambda: None,
    *,
    carried_state: CarriedState | None = None,
    report_positions: Callable[[str, list[PositionLoss]], None] = lambda name, rows: None,
) -> Callable[[PyTree], dict[str, float]]:
    """Creates a function that evaluates parameters.

    Args:
        mesh: The mesh.
        params_specs: Partition specs of the parameters.
        apply_fn: The model's `apply`.
        sets: Validation sets.
        max_batches: Largest number of batches of each set; None for all.
        on_batch: Called after each batch.
        carried_state: The states that rows carry from batch to batch; None if every batch starts
            with the zero state.
        report_positions: Called with the name of each set whose batches have positions, and its
            losses by position in the document.

    Returns:
        A function of boxed parameters. For each set it returns `val_loss` (nats per token),
        `val_perplexity`, `val_accuracy` (the share of targets that have the largest logit) and, for
        text, `val_bits_per_byte`. If the set has a name, the keys end in `_<name>`. The function
        raises DivergedError if a loss is not finite.
    """
    shard = process_shard(mesh)
    eval_step = create_eval_step(
        mesh,
        params_specs,
        lambda params, batch, carried: eval_sums(params, apply_fn, batch, carried),
        carried_state and carried_state.specs,
    )

    def sum_up(params: PyTree, validation_set: ValidationSet | TaskValidationSet) -> np.ndarray:
        """Returns the sums of negative log-likelihood, correct predictions and targets by group."""
        total, last = np.zeros((3, 1)), None
        carried = carried_state and carried_state.create(mesh)
        batches = validation_set.batches(max_batches=max_batches, **shard)
        for batch in global_batches(batches, mesh):
            # The next batch is enqueued while the devices compute the previous one.
            (sums, carried), done = eval_step(params, batch, carried), last
            total, last = total + _fetch(done), sums
            on_batch()
        return total + _fetch(last)

    def evaluate(params: PyTree) -> dict[str, float]:
        row = {}
        for validation_set in sets:
            suffix = f"_{validation_set.name}" if validation_set.name else ""
            by_group = sum_up(params, validation_set)
            nll, num_correct, count = by_group.sum(axis=1)
            if not math.isfinite(nll):
                raise DivergedError(f"val_loss{suffix} is {nll}: the model has diverged")
            loss, num_bytes = nll / count, validation_set.num_bytes(max_batches)
            row |= {
                f"val_loss{suffix}": loss,
                f"val_perplexity{suffix}": math.exp(min(loss, 700)),
                f"val_accuracy{suffix}": num_correct / count,
            }
            if num_bytes is not None:
                # In a very short text all targets may be markers, which have no bytes.
                row[f"val_bits_per_byte{suffix}"] = nll / math.log(2) / max(num_bytes, 1)
            if by_group.shape[1] > 1:
                report_positions(validation_set.name, _position_losses(by_group))
        return row

    return evaluate


def _fetch(sums: Metrics | None) -> np.ndarray:
    """Returns sums as float64 `(3, G)`, which broadcasts if there are none."""
    return np.zeros((3, 1)) if sums is None else np.array(jax.device_get(sums), np.float64)


def _position_losses(by_group: np.ndarray) -> list[PositionLoss]:
    """Returns the losses of the groups that have targets."""
    return [
        PositionLoss(*group_range(group), nll / count, int(count))
        for group, (nll, _, count) in enumerate(by_group.T)
        if count
    ]
