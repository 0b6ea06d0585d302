"""Optimizers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from xlstm.trainer.base.param_utils import get_param_mask_fn, get_sharded_global_norm


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by the global norm."""

    beta1: float = 0.9  # Decay of the mean of the gradients.
    beta2: float = 0.95  # Decay of the mean of their squares.
    eps: float = 1e-8  # Added to the root of the squares.
    weight_decay: float = 0.1  # Weight decay, multiplied by the learning rate.
    weight_decay_exclude: tuple[str, ...] = ("bias", "norm", "embeddings")  # Regular expressions
    # on parameter paths: what they match is not decayed.
    grad_clip_norm: float = 1.0  # The gradient is scaled down to this global norm.

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)}: it must be at least 0 and below 1"
                )
        for name in ("eps", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: it must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay}: it must not be negative")
        for pattern in self.weight_decay_exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"optimizer.weight_decay_exclude: {pattern!r} is no regular expression: {error}"
                ) from None


def clip_by_sharded_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm that counts the shards on all devices.

    Args:
        max_norm: Largest norm.

    Returns:
        The transformation; `optax.clip_by_global_norm` would see one device's shards only.
    """

    def update(updates, state, params=None):
        del params
        norm, _ = get_sharded_global_norm(updates)
        scale = max_norm / jnp.maximum(norm, max_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def create_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Creates AdamW with clipping.

    Args:
        config: Options.
        schedule: Learning rate as a function of the step.

    Returns:
        The optimizer; it takes trees of boxed or plain leaves.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    return optax.chain(
        clip_by_sharded_global_norm(config.grad_clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=get_param_mask_fn(config.weight_decay_exclude),
        ),
    )
