"""The next-token loss."""

from collections.abc import Callable
from typing import Any

import jax

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree
from xlstm.dataset.batch import Batch
from xlstm.models.xlstm_parallel.blocks.block import CARRIED_STATE
from xlstm.models.xlstm_parallel.pattern import BlockPattern
from xlstm.trainer.llm.gate_statistics import gate_moments
from xlstm.trainer.llm.position_groups import NUM_GROUPS, position_group


def loss_metrics(
    params: PyTree,
    apply_fn: Callable,
    batch: Batch,
    dropout_keys: PRNGKeyArray | None,
    carried_state: PyTree | None = None,
    *,
    gate_pattern: BlockPattern | None = None,
) -> tuple[Metrics, PyTree | None]:
    """Returns the training metrics of a batch, and the carried state after it.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.
        dropout_keys: A random key for each example, `(B, ...)`; None for no dropout.
        carried_state: State before the batch, see `stack.carried_state`; None for the zero state.
        gate_pattern: The model's pattern of blocks, which adds the metric `gates` (see
            `gate_moments`); None omits it.

    Returns:
        The metrics `loss`, the pair that `xLSTMLMModel.next_token_nll` returns, and `gates`; and
        the state after the batch, None if none was given.
    """
    created = [] if gate_pattern is None else ["intermediates"]
    sums, variables = _apply(
        params, apply_fn, batch, carried_state, created, dropout_keys, method="next_token_nll"
    )
    metrics = {"loss": sums}
    if gate_pattern is not None:
        metrics["gates"] = gate_moments(variables, gate_pattern)
    return metrics, variables.get(CARRIED_STATE)


def eval_sums(
    params: PyTree, apply_fn: Callable, batch: Batch, carried_state: PyTree | None = None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], PyTree | None]:
    """Returns the evaluation sums of a batch, and the carried state after it.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.
        carried_state: See `loss_metrics`.

    Returns:
        The sums, see `xLSTMLMModel.eval_sums`, of one group; or, if the batch has positions, of all
        groups of `position_groups`. And the state after the batch, None if none was given.
    """
    options = {}
    if batch.positions is not None:
        options = {"groups": position_group(batch.positions), "num_groups": NUM_GROUPS}
    sums, variables = _apply(
        params, apply_fn, batch, carried_state, [], method="eval_sums", **options
    )
    return sums, variables.get(CARRIED_STATE)


def _apply(
    params: PyTree,
    apply_fn: Callable,
    batch: Batch,
    carried_state: PyTree | None,
    created: list[str],
    *arguments: Any,
    **options: Any,
) -> tuple[Any, PyTree]:
    """Applies a method of the model, and returns its result and the mutable variables."""
    variables, mutable = {"params": params}, list(created)
    if carried_state is not None:
        variables[CARRIED_STATE] = carried_state
        mutable.append(CARRIED_STATE)
    tokens = batch.inputs, batch.targets, batch.targets_mask, batch.reset
    return apply_fn(variables, *tokens, *arguments, mutable=mutable, **options)
