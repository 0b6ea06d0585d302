"""The compiled steps of training and evaluation: gradients, the update, metrics."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.distributed.data_parallel import sum_gradients
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.distributed.single_gpu import LossFn, accumulate_gradients_scan
from xlstm.trainer.base.param_utils import (
    get_grad_norms,
    get_param_norms,
    get_sharded_global_norm,
    reboxed,
    unboxed,
)

_NORM_DECAY = 0.98  # Decay of the moving average of gradient norms, over some fifty steps.

# Partition spec of every leaf of a batch: the examples are sharded, all other axes are not.
BATCH_SPEC = P(BATCH_AXES)


def create_train_step(
    mesh: Mesh,
    state_specs: PyTree,
    create_loss_fn: Callable[[int, jax.Array], LossFn],
    count_targets: Callable[[PyTree], jax.Array],
    update: Callable[..., tuple[TrainState, Metrics]],
    num_minibatches: int,
    norms_per_param: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Creates the compiled training step.

    Args:
        mesh: The mesh.
        state_specs: Partition specs of the train state.
        create_loss_fn: Creates the loss function from the number of minibatches and the number of
            targets in the global batch. The function's batch is a pair: the examples, and a random
            key for each, which depends only on the step and on the example's index in the global
            batch. Its loss and metrics are summed over all devices of the mesh.
        count_targets: Returns the number of targets in a batch.
        update: Computes the next state, see `update_state`, from a state, gradients, their global
            norm, the sum of the losses, and a function that computes such a norm.
        num_minibatches: Number of minibatches that each device's part of a batch is split into.
        norms_per_param: Whether the metrics include the norms of single parameters.

    Returns:
        A function `(state, batch, requests=None) -> (state, metrics)` that consumes the state.
        `batch` is a global batch, and `requests` is `Requests.current()`. The metrics are those of
        the loss function and of `update`, `grad_norm`, `param_norm`, and `request`, the largest
        request of all processes.
    """
    # Gradients do not depend on the optimizer's state.
    without = {"opt_state": None, "params_ema": None}
    compute_gradients = jax.shard_map(
        functools.partial(
            _compute_gradients,
            axis_names=mesh.axis_names,
            create_loss_fn=create_loss_fn,
            count_targets=count_targets,
            num_minibatches=num_minibatches,
            norms_per_param=norms_per_param,
        ),
        mesh=mesh,
        in_specs=(state_specs.replace(**without), BATCH_SPEC, P(mesh.axis_names)),
        out_specs=(state_specs.params, P()),
        check_vma=False,
    )
    global_norm = _create_global_norm(mesh, state_specs.params)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs)

    @functools.partial(
        jax.jit, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P()))
    )
    def train_step(
        state: TrainState, batch: PyTree, requests: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = compute_gradients(state.replace(**without), batch, requests)
        total_loss, _ = metrics["loss"]
        state, update_metrics = update(state, grads, metrics["grad_norm"], total_loss, global_norm)
        return state, metrics | update_metrics

    return train_step


def _compute_gradients(
    state: TrainState,
    batch: PyTree,
    requests: jax.Array | None,
    *,
    axis_names: tuple[str, ...],
    create_loss_fn: Callable[[int, jax.Array], LossFn],
    count_targets: Callable[[PyTree], jax.Array],
    num_minibatches: int,
    norms_per_param: bool,
) -> tuple[PyTree, Metrics]:
    """Computes gradients and metrics of a global batch inside `shard_map`."""
    rng = jax.random.fold_in(state.rng, state.step)
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    indices = lax.axis_index(BATCH_AXES) * batch_size + jnp.arange(batch_size)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(indices)
    num_targets = lax.psum(count_targets(batch), BATCH_AXES)
    loss_fn = create_loss_fn(num_minibatches, jnp.maximum(num_targets, 1))
    grads, metrics, _ = accumulate_gradients_scan(
        state, (batch, keys), rng, num_minibatches, loss_fn
    )
    grads = sum_gradients(grads, axis_names)
    metrics = lax.psum(metrics, axis_names)
    metrics |= get_grad_norms(grads, norms_per_param)
    metrics |= get_param_norms(state.params, norms_per_param)
    if requests is not None:
        metrics["request"] = lax.pmax(requests[0], axis_names)
    return grads, metrics


def _create_global_norm(mesh: Mesh, params_specs: PyTree) -> Callable[[PyTree], jax.Array]:
    """Creates a function that computes the norm of a tree sharded like the parameters."""
    return jax.shard_map(
        lambda tree: get_sharded_global_norm(tree)[0],
        mesh=mesh,
        in_specs=(params_specs,),
        out_specs=P(),
        check_vma=False,
    )


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
    mesh. A step is skipped if its gradient norm or loss is not finite, or its gradient norm is too
    large: it counts, but parameters and optimizer stay as they are.

    Args:
        state: The state before the step, outside of `shard_map`.
        grads: Gradients, boxed like the parameters.
        grad_norm: Their global norm, a float32 scalar.
        loss: The loss, or its sum, a float32 scalar.
        global_norm: Computes the norm of a tree that is boxed and sharded like the parameters.
        schedule: Learning rate as a function of the number of steps done before.
        grad_clip_norm: Gradients with a larger norm are scaled down to this norm.
        max_grad_norm_ratio: A gradient norm above this many times its moving average is too large;
            0 disables.
        ema_decay: Decay of the moving average of the parameters, if the state has one. It starts
            smaller, `(1 + step) / (10 + step)`, so that the initial parameters are soon forgotten.

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
    # The average counts a limited norm: after many large norms in a row they are no outliers.
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
    """Returns the moving average of the parameters after a step; see `ema_decay` above."""
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)


def create_eval_step(
    mesh: Mesh,
    params_specs: PyTree,
    eval_fn: Callable[[PyTree, PyTree], Metrics],
) -> Callable[[PyTree, PyTree], Metrics]:
    """Creates the compiled evaluation step.

    Args:
        mesh: The mesh.
        params_specs: Partition specs of the parameters.
        eval_fn: Computes metrics from parameters and this device's part of a batch; they are summed
            over all devices of the mesh.

    Returns:
        A function `(params, batch) -> metrics` of a global batch.
    """

    def step(params: PyTree, batch: PyTree) -> Metrics:
        return lax.psum(eval_fn(params, batch), mesh.axis_names)

    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(params_specs, BATCH_SPEC), out_specs=P(), check_vma=False
        )
    )
