"""Changes the parameters by their gradients, unless the gradients look wrong."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.trainer.base.param_utils import reboxed, unboxed

_NORM_DECAY = 0.98  # Of the moving average of gradient norms: some fifty steps.


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
    """Makes one step of the optimizer: `params -= lr * direction(clipped gradient)`.

    The arrays are global, and the compiler divides the work as they are divided: so whatever the
    optimizer does with a parameter is exact on every mesh. A step whose gradient norm or loss is
    not finite, or whose norm is too large, counts as done but leaves parameters and optimizer as
    they are.

    Args:
        state: The state before, outside of `shard_map`.
        grads: Gradients, boxed like the parameters.
        grad_norm: Their global norm, a float32 scalar.
        loss: The loss, or its sum, a float32 scalar.
        global_norm: Computes the norm of a tree that is boxed and placed like the parameters.
        schedule: Learning rate as a function of the steps done before.
        grad_clip_norm: The gradient is scaled down to this norm.
        max_grad_norm_ratio: A norm above so many times its moving average is too large; 0: none is.
        ema_decay: Decay of the moving average of the parameters, if the state has one. It begins
            smaller, `(1 + step) / (10 + step)`, so that the initial parameters are soon forgotten.

    Returns:
        The state after, and the metrics `lr`, `update_norm` (of the change of the parameters),
        `skipped` (1 or 0) and `skipped_steps` (so far).
    """
    mean, is_good = state.grad_norm_mean, jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    # What counts for the average is limited: of many large norms in a row the last are no outliers.
    counted = grad_norm
    if max_grad_norm_ratio:
        limit = jnp.where(mean > 0, max_grad_norm_ratio * mean, jnp.inf)
        is_outlier = grad_norm > limit
        counted = jnp.minimum(grad_norm, limit)
    new_mean = jnp.where(mean > 0, _NORM_DECAY * mean + (1 - _NORM_DECAY) * counted, counted)
    mean = jnp.where(is_good, new_mean, mean)
    if max_grad_norm_ratio:
        is_good &= ~is_outlier

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
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        moved = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, before, params)
        params_ema = reboxed(choose(moved, before), params_ema)
    state = state.replace(
        step=state.step + 1,
        params=reboxed(params, state.params),
        opt_state=choose(opt_state, state.opt_state),
        params_ema=params_ema,
        grad_norm_mean=mean,
        skipped_steps=state.skipped_steps + ~is_good,
    )
    return state, {
        "lr": lr,
        "update_norm": update_norm,
        "skipped": (~is_good).astype(jnp.int32),
        "skipped_steps": state.skipped_steps,
    }
