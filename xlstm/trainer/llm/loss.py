"""The next-token loss."""

from collections.abc import Callable

import jax

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree
from xlstm.dataset.batch import Batch
from xlstm.distributed.single_gpu import LossFn


def next_token_nll(
    params: PyTree, apply_fn: Callable, batch: Batch, dropout_keys: PRNGKeyArray | None = None
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of a batch's targets.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.
        dropout_keys: A random key for each example, `(B, ...)`; None for no dropout.

    Returns:
        The sum over this device's targets that count, in nats, and their number; float32 scalars.
    """
    return apply_fn(
        {"params": params},
        batch.inputs,
        batch.targets,
        batch.targets_mask,
        batch.reset,
        dropout_keys,
        method="next_token_nll",
    )


def create_loss_fn(num_minibatches: int, num_targets: jax.Array) -> LossFn:
    """Makes the loss of a minibatch.

    The loss is `nll * num_minibatches / num_targets`, so that its mean over the minibatches, summed
    over the devices, is the loss per target of the whole global batch, however it was divided.

    Args:
        num_minibatches: Number of minibatches that gradients are accumulated over.
        num_targets: Number of targets that count in the whole global batch.

    Returns:
        A loss function for `xlstm.distributed.single_gpu`; its metric `loss` is (nll, targets).
    """

    def loss_fn(
        params: PyTree,
        apply_fn: Callable,
        batch: tuple[Batch, PRNGKeyArray],
        rng: PRNGKeyArray,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        del rng  # Every example has a key of its own, which the mesh has no part in.
        nll, count = next_token_nll(params, apply_fn, *batch)
        return nll * num_minibatches / num_targets, ({"loss": (nll, count)}, None)

    return loss_fn
