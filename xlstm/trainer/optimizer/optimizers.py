"""Optimizers, without clipping and learning rate.

An optimizer here computes a direction: the training step clips the gradient before, and then
applies `params -= learning rate * direction`. All trees hold plain, global arrays. Leaves below
`blocks` are stacks of the parameters of all blocks, each of which counts as a parameter.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax

from xlstm.common_types import PyTree
from xlstm.finite import check_finite
from xlstm.trainer.base.param_utils import get_param_mask_fn, path_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its constants, and what the training step does around it."""

    name: str = "adamw"  # Use this optimizer: adamw, lion, adafactor, muon, sgd or ademamix.
    beta1: float = 0.9  # Decay the first moment by this factor (AdamW, Muon's AdamW, AdEMAMix), or
    # weigh the momentum in the direction by it (Lion).
    beta2: float = 0.95  # Decay the second moment by this factor (AdamW, Muon's AdamW, AdEMAMix),
    # or the momentum (Lion).
    eps: float = 1e-8  # Add this constant to the root of the second moment (AdamW, Muon's AdamW,
    # AdEMAMix).
    momentum: float = 0.95  # Decay the momentum by this factor (SGD, Muon).
    nesterov: bool = True  # Use Nesterov momentum (SGD, Muon).
    muon_exclude: tuple[str, ...] = ("embeddings", "lm_head")  # Use AdamW for matrices whose path
    # matches one of these regular expressions, and for all parameters that are not matrices (Muon).
    beta3: float = 0.9999  # Decay the slow first moment by this factor (AdEMAMix).
    alpha: float = 8.0  # Weigh the slow first moment by this factor (AdEMAMix).
    ademamix_warmup_steps: int = 0  # Raise beta3 from beta1, and alpha from 0, over this many steps
    # (AdEMAMix); the paper uses the whole run. 0 disables.
    weight_decay: float = 0.1  # Decay the parameters by this factor times the learning rate.
    weight_decay_exclude: tuple[str, ...] = ("bias", "norm", "embeddings", "skip")  # Do not decay
    # parameters whose path matches one of these regular expressions.
    grad_clip_norm: float = 1.0  # Scale gradients with a larger global norm down to this norm.
    max_grad_norm_ratio: float = 0.0  # Skip steps whose gradient norm exceeds this many times its
    # moving average; 0 disables.
    ema_decay: float = 0.0  # Keep a moving average of the parameters with this decay, and evaluate
    # it instead of the parameters; 0 disables.

    def __post_init__(self):
        check_finite("optimizer.", self)
        if self.name not in _DIRECTIONS:
            raise ValueError(
                f"optimizer.name={self.name!r} is unknown: choose one of {', '.join(_DIRECTIONS)}"
            )
        for name in ("beta1", "beta2", "beta3", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)}: it must be at least 0 and below 1"
                )
        for name in ("eps", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: it must be positive")
        for name in ("alpha", "ademamix_warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: it must not be negative")
        if self.max_grad_norm_ratio != 0 and not self.max_grad_norm_ratio > 1:
            raise ValueError(
                f"optimizer.max_grad_norm_ratio={self.max_grad_norm_ratio}: it must be above 1,"
                " or 0 to disable it"
            )
        for name in ("muon_exclude", "weight_decay_exclude"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"optimizer.{name}: {pattern!r} is not a regular expression: {error}"
                    ) from None


def create_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Creates an optimizer: a direction with decoupled weight decay.

    Args:
        config: The options.

    Returns:
        A transformation of clipped gradients to the direction, which is multiplied by the learning
        rate and subtracted from the parameters. Its trees hold plain, global arrays.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, with the
        weight decay multiplied by the learning rate. Each direction below names its own.
    """
    return optax.chain(
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=get_param_mask_fn(
                # The default names parameters that not every model has.
                config.weight_decay_exclude,
                may_be_missing=OptimizerConfig.weight_decay_exclude,
            ),
        ),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Kingma and Ba, "Adam", 2015, algorithm 1."""
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, program 1."""
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def _sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    """Sutskever et al., "On the importance of initialization and momentum", 2013, section 2."""
    return optax.trace(config.momentum, nesterov=config.nesterov)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Shazeer and Stern, "Adafactor", 2018, algorithms 4 and 5 with the constants of 6.

    The learning rate is relative to the scale of each parameter. There is no first moment, and
    matrices with a side below 128 are not factored.
    """
    del config  # All constants are the paper's.
    direction = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def init(params: PyTree) -> PyTree:
        return jax.vmap(direction.init)(params) if jax.tree.leaves(params) else ()

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        if not jax.tree.leaves(params):
            return updates, state
        return jax.vmap(direction.update)(updates, state, params)

    def kinds(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "stacked" if _is_stacked(path) else "single", params
        )

    stacked = optax.GradientTransformation(init, update)
    return optax.partition({"stacked": stacked, "single": direction}, kinds)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Jordan et al., "Muon", 2024, scaled as in Liu et al., "Muon is Scalable", 2025, section 2.2.

    This scale gives a direction a root mean square of about 0.2, as for AdamW, so the same learning
    rate and weight decay work for both. Parameters that are not matrices use AdamW.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            nesterov=config.nesterov,
            # Leading axes are those of stacks: each block is orthogonalized on its own.
            weight_dimension_numbers=lambda updates: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
            ),
        ),
        optax.stateless_with_tree_map(lambda u, _: 0.2 * math.sqrt(max(u.shape[-2:])) * u),
    )
    mask_fn = get_param_mask_fn(config.muon_exclude)

    def kinds(params: PyTree) -> PyTree:
        def kind(path: tuple, x: jax.Array, is_selected: bool) -> str:
            return "muon" if is_selected and x.ndim - _is_stacked(path) == 2 else "adam"

        return jax.tree_util.tree_map_with_path(kind, params, mask_fn(params))

    return optax.partition({"muon": muon, "adam": _adam(config)}, kinds)


def _ademamix(config: OptimizerConfig) -> optax.GradientTransformation:
    """Pagliardini et al., "The AdEMAMix Optimizer", 2024, algorithm 1."""
    num_steps = config.ademamix_warmup_steps
    # The inverse of the logarithm of the decay changes linearly.
    first, last = (1 / math.log(max(beta, 1e-30)) for beta in (config.beta1, config.beta3))

    def progress(count: jax.Array) -> jax.Array:
        return jnp.minimum((count + 1) / num_steps, 1.0)

    def beta3(count: jax.Array) -> jax.Array:
        return jnp.exp(1 / (first + (last - first) * progress(count)))

    def alpha(count: jax.Array) -> jax.Array:
        return config.alpha * progress(count)

    return optax.contrib.scale_by_ademamix(
        b1=config.beta1,
        b2=config.beta2,
        b3=beta3 if num_steps else config.beta3,
        alpha=alpha if num_steps else config.alpha,
        eps=config.eps,
    )


def _is_stacked(path: tuple) -> bool:
    return path_name(path).startswith("blocks.")


_DIRECTIONS = {
    "adamw": _adam,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
    "ademamix": _ademamix,
}
