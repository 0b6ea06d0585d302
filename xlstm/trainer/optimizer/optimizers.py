"""Optimizers.

An optimizer here says in which direction to go: the training step clips the gradient before, and
makes `params -= learning rate * direction` of it. All trees are of plain, global arrays; leaves
below `blocks` are stacks of the parameters of all blocks, and each block's count as a parameter.
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
    """Which optimizer, its constants, and what the training step does around it."""

    name: str = "adamw"  # One of adamw, lion, adafactor, muon, sgd and ademamix.
    beta1: float = 0.9  # AdamW, Muon's AdamW, AdEMAMix: decay of the mean of the gradients. Lion:
    # weight of their mean in the direction.
    beta2: float = 0.95  # AdamW, Muon's AdamW, AdEMAMix: decay of the mean of their squares. Lion:
    # decay of their mean.
    eps: float = 1e-8  # AdamW, Muon's AdamW, AdEMAMix: added to the root of the squares.
    momentum: float = 0.95  # SGD, Muon: decay of the sum of the gradients.
    nesterov: bool = True  # SGD, Muon: whether the momentum looks one step ahead.
    muon_exclude: tuple[str, ...] = ("embeddings", "lm_head")  # Muon: regular expressions on
    # parameter paths: matrices that AdamW updates, as it does all that is no matrix.
    beta3: float = 0.9999  # AdEMAMix: decay of the slow mean of the gradients.
    alpha: float = 8.0  # AdEMAMix: weight of the slow mean.
    ademamix_warmup_steps: int = 0  # AdEMAMix: steps in which beta3, from beta1, and alpha, from 0,
    # rise; the paper takes the whole run.
    weight_decay: float = 0.1  # Weight decay, multiplied by the learning rate.
    weight_decay_exclude: tuple[str, ...] = ("bias", "norm", "embeddings", "skip")  # Regular
    # expressions on parameter paths: what they match is not decayed.
    grad_clip_norm: float = 1.0  # The gradient is scaled down to this global norm.
    max_grad_norm_ratio: float = 0.0  # Steps whose gradient norm is above so many times its moving
    # mean are skipped; 0: none are.
    ema_decay: float = 0.0  # Decay of a moving average of the parameters, which is what evaluation
    # then takes; 0: there is none.

    def __post_init__(self):
        check_finite("optimizer.", self)
        if self.name not in _DIRECTIONS:
            raise ValueError(
                f"optimizer.name={self.name!r}: the optimizers are {', '.join(_DIRECTIONS)}"
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
                " or 0 to skip no step"
            )
        for name in ("muon_exclude", "weight_decay_exclude"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"optimizer.{name}: {pattern!r} is no regular expression: {error}"
                    ) from None


def create_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Creates an optimizer: a direction, and decoupled weight decay.

    Args:
        config: Options.

    Returns:
        The transformation of gradients, already clipped, to what is multiplied by the learning rate
        and subtracted from the parameters. Its trees hold plain, global arrays.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, with the
        weight decay multiplied by the learning rate. The directions give theirs.
    """
    return optax.chain(
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=get_param_mask_fn(
                # Not every model has all that the default is about.
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

    Its learning rate is relative to the scale of each parameter. There is no first moment, and
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

    So the root mean square of a direction is about 0.2, that of AdamW's, and one learning rate and
    weight decay do for both. What is no matrix gets AdamW's direction.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            nesterov=config.nesterov,
            # Axes before the last two are those of the blocks, each orthogonalised on its own.
            weight_dimension_numbers=lambda updates: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
            ),
        ),
        optax.stateless_with_tree_map(lambda u, _: 0.2 * math.sqrt(max(u.shape[-2:])) * u),
    )
    mask_fn = get_param_mask_fn(config.muon_exclude)

    def kinds(params: PyTree) -> PyTree:
        def kind(path: tuple, x: jax.Array, is_chosen: bool) -> str:
            return "muon" if is_chosen and x.ndim - _is_stacked(path) == 2 else "adam"

        return jax.tree_util.tree_map_with_path(kind, params, mask_fn(params))

    return optax.partition({"muon": muon, "adam": _adam(config)}, kinds)


def _ademamix(config: OptimizerConfig) -> optax.GradientTransformation:
    """Pagliardini et al., "The AdEMAMix Optimizer", 2024, algorithm 1."""
    num_steps = config.ademamix_warmup_steps
    # Between the two decays it is the inverse of the logarithm that changes linearly.
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
