"""The next-token loss."""

from collections.abc import Callable
from typing import Any

import jax

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree
from xlstm.dataset.batch import Batch
from xlstm.models.xlstm_parallel.pattern import BlockPattern
from xlstm.trainer.llm.gate_statistics import gate_moments


def next_token_nll(
    params: PyTree, apply_fn: Callable, batch: Batch, dropout_keys: PRNGKeyArray | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the negative log-likelihood of a batch's targets.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.
        dropout_keys: A random key for each example, `(B, ...)`; None for no dropout.

    Returns:
        The sum over this device's targets that count, in nats, and their number; float32 scalars.
    """
    return _apply(params, apply_fn, batch, dropout_keys)


def eval_sums(
    params: PyTree, apply_fn: Callable, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the evaluation sums of a batch; see `xLSTMLMModel.eval_sums`."""
    tokens = batch.inputs, batch.targets, batch.targets_mask, batch.reset
    return apply_fn({"params": params}, *tokens, method="eval_sums")


def _apply(
    params: PyTree, apply_fn: Callable, batch: Batch, keys: PRNGKeyArray | None, **options: Any
) -> Any:
    return apply_fn(
        {"params": params},
        batch.inputs,
        batch.targets,
        batch.targets_mask,
        batch.reset,
        keys,
        method="next_token_nll",
        **options,
    )


def loss_metrics(
    params: PyTree,
    apply_fn: Callable,
    batch: Batch,
    dropout_keys: PRNGKeyArray | None,
    *,
    gate_pattern: BlockPattern | None = None,
) -> Metrics:
    """Returns the training metrics of a batch.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.
        dropout_keys: See `next_token_nll`.
        gate_pattern: The model's pattern of blocks, which adds the metric `gates` (see
            `gate_moments`); None omits it.

    Returns:
        The metrics: `loss`, as `next_token_nll` returns it, and `gates`.
    """
    if gate_pattern is None:
        return {"loss": next_token_nll(params, apply_fn, batch, dropout_keys)}
    sums, variables = _apply(params, apply_fn, batch, dropout_keys, mutable=["intermediates"])
    return {"loss": sums, "gates": gate_moments(variables, gate_pattern)}
