"""The next-token loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree
from xlstm.dataset.batch import Batch
from xlstm.distributed.single_gpu import LossFn


def next_token_nll(params: PyTree, apply_fn: Callable, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of a batch's targets.

    Args:
        params: Parameters of the model.
        apply_fn: The model's `apply`.
        batch: Tokens, `(B, T)`.

    Returns:
        The sum over the targets that count, in nats, and their number; float32 scalars.
    """
    logits = apply_fn({"params": params}, batch.inputs, batch.reset)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    mask = batch.targets_mask
    return jnp.sum(jnp.where(mask, nll, 0)), jnp.sum(mask, dtype=jnp.float32)


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
        params: PyTree, apply_fn: Callable, batch: Batch, rng: PRNGKeyArray
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        del rng  # No layer draws random numbers.
        nll, count = next_token_nll(params, apply_fn, batch)
        return nll * num_minibatches / num_targets, ({"loss": (nll, count)}, None)

    return loss_fn
