"""The update of the train state by a gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.trainer.base.param_utils import reboxed, unboxed

_NORM_DECAY = 0.98  # Decay of the moving average of gradient norms, over some fifty steps.


def update_state(
    state: TrainState,
    grads: PyTree,
    grad_norm: jax.Array,
    loss: jax.Array,
    global_norm: Callable[[PyTree], jax.Array],
    *,
    schedule: optax.Schedule,
    grad_clip_norm: float,
    max_grad_norm_ratio: float,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """Applies one step of the optimizer: `params -= lr * direction(clipped gradient)`.

    The arrays are global and the compiler partitions the work, so any optimizer is exact on every
    mesh. A step is skipped if its loss or gradient norm is not finite, or that norm is too large:
    `step` advances, but parameters and optimizer state stay as they are.

    Args:
        state: The state before the step, outside of `shard_map`.
        grads: Gradients, boxed like the parameters.
        grad_norm: Their global norm, a float32 scalar.
        loss: The loss or a sum of losses, a float32 scalar.
        global_norm: Computes the norm of a tree that is boxed and sharded like the parameters.
        schedule: Maps the number of steps done before to the learning rate.
        grad_clip_norm: Gradients with a larger norm are scaled down to this norm.
        max_grad_norm_ratio: A gradient norm above this many times its moving average is too large;
            0 disables.
        ema_decay: Decay of the moving average of the parameters, if the state has one. At most
            `(1 + step) / (10 + step)` is used, so that the initial parameters are soon forgotten.

    Returns:
        The state after the step, and the metrics `lr`, `update_norm` (norm of the change of the
        parameters), `skipped` (1 or 0) and `skipped_steps` (so far).
    """
    is_good, grad_norm_mean = _check_gradient(
        state.grad_norm_mean, grad_norm, loss, max_grad_norm_ratio
    )

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(is_good, x, y), new, old)

    lr, params = jnp.asarray(schedule(state.step), jnp.float32), unboxed(state.params)
    scale = grad_clip_norm / jnp.maximum(grad_norm, grad_clip_norm)
    clipped = jax.tree.map(lambda g: g * scale.astype(g.dtype), unboxed(grads))
    updates, opt_state = state.tx.update(clipped, state.opt_state, params)
    update_norm = jnp.where(is_good, lr * global_norm(reboxed(updates, state.params)), 0.0)
    params = choose(
        jax.tree.map(lambda p, u: p - (lr * u).astype(p.dtype), params, updates), params
    )
    params_ema = state.params_ema
    if params_ema is not None:
        before = unboxed(params_ema)
        moved = _move_average(before, params, state.step, ema_decay)
        params_ema = reboxed(choose(moved, before), params_ema)
    state = state.replace(
        step=state.step + 1,
        params=reboxed(params, state.params),
        opt_state=choose(opt_state, state.opt_state),
        params_ema=params_ema,
        grad_norm_mean=grad_norm_mean,
        skipped_steps=state.skipped_steps + ~is_good,
    )
    return state, {
        "lr": lr,
        "update_norm": update_norm,
        "skipped": (~is_good).astype(jnp.int32),
        "skipped_steps": state.skipped_steps,
    }


def _check_gradient(
    mean: jax.Array, grad_norm: jax.Array, loss: jax.Array, max_grad_norm_ratio: float
) -> tuple[jax.Array, jax.Array]:
    """Decides whether to apply a gradient, and updates the moving average of gradient norms.

    Args:
        mean: The moving average before the step; 0 before the first one.
        grad_norm: See `update_state`.
        loss: See `update_state`.
        max_grad_norm_ratio: See `update_state`.

    Returns:
        Whether to apply the gradient, and the moving average after the step; scalars.
    """
    is_good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    # The average takes the limited norm, so many large norms in a row stop being outliers.
    counted = grad_norm
    if max_grad_norm_ratio:
        limit = jnp.where(mean > 0, max_grad_norm_ratio * mean, jnp.inf)
        is_outlier = grad_norm > limit
        counted = jnp.minimum(grad_norm, limit)
    new_mean = jnp.where(mean > 0, _NORM_DECAY * mean + (1 - _NORM_DECAY) * counted, counted)
    mean = jnp.where(is_good, new_mean, mean)
    if max_grad_norm_ratio:
        is_good &= ~is_outlier
    return is_good, mean


def _move_average(average: PyTree, params: PyTree, step: jax.Array, ema_decay: float) -> PyTree:
    """Returns the moving average of the parameters after a step; see `update_state`."""
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
