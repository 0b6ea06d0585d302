"""The training step: gradients, their norm, the update."""

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


# Partition spec of every leaf of a batch: the examples are divided, the rest is whole.
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
    """Makes the compiled training step.

    Args:
        mesh: The mesh.
        state_specs: Partition specs of the train state.
        create_loss_fn: Makes the loss from the numbers of minibatches and of targets of the whole
            global batch. Its batch is a pair, the examples and a random key for each, which depends
            on the step and on the example's place in the global batch alone. It returns what this
            device contributes: loss and metrics are summed over all devices of the mesh.
        count_targets: Counts the targets in a batch.
        update: Makes the next state of a state, gradients, their global norm, the sum of the
            losses and what computes such a norm, see `update_state`.
        num_minibatches: Number of minibatches that each device's share of a batch is cut into.
        norms_per_param: Whether the norms of single parameters are metrics too.

    Returns:
        A function `(state, batch, requests=None)` of a state, which it consumes, a global batch,
        and what the processes ask for (see `process_requests`), that returns the next state and the
        metrics: those of the loss function and of `update`, `grad_norm`, `param_norm`, and
        `request`, the largest of the requests.
    """

    def compute_gradients(
        state: TrainState, batch: PyTree, requests: jax.Array | None
    ) -> tuple[PyTree, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        places = lax.axis_index(BATCH_AXES) * batch_size + jnp.arange(batch_size)
        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(places)
        num_targets = lax.psum(count_targets(batch), BATCH_AXES)
        loss_fn = create_loss_fn(num_minibatches, jnp.maximum(num_targets, 1))
        grads, metrics, _ = accumulate_gradients_scan(
            state, (batch, keys), rng, num_minibatches, loss_fn
        )
        grads = sum_gradients(grads, mesh.axis_names)
        metrics = lax.psum(metrics, mesh.axis_names)
        metrics |= get_grad_norms(grads, norms_per_param)
        metrics |= get_param_norms(state.params, norms_per_param)
        if requests is not None:
            metrics["request"] = lax.pmax(requests[0], mesh.axis_names)
        return grads, metrics

    # The optimizer's state has no part in the gradients.
    without = {"opt_state": None, "params_ema": None}
    compute_gradients = jax.shard_map(
        compute_gradients,
        mesh=mesh,
        in_specs=(state_specs.replace(**without), BATCH_SPEC, P(mesh.axis_names)),
        out_specs=(state_specs.params, P()),
        check_vma=False,
    )
    global_norm = jax.shard_map(
        lambda tree: get_sharded_global_norm(tree)[0],
        mesh=mesh,
        in_specs=(state_specs.params,),
        out_specs=P(),
        check_vma=False,
    )
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


def create_eval_step(
    mesh: Mesh,
    params_specs: PyTree,
    eval_fn: Callable[[PyTree, PyTree], Metrics],
) -> Callable[[PyTree, PyTree], Metrics]:
    """Makes the compiled evaluation step.

    Args:
        mesh: The mesh.
        params_specs: Partition specs of the parameters.
        eval_fn: Computes this device's metrics, which are sums, from parameters and a batch.

    Returns:
        A function of parameters and a global batch that returns the metrics of the whole batch.
    """

    def step(params: PyTree, batch: PyTree) -> Metrics:
        return lax.psum(eval_fn(params, batch), mesh.axis_names)

    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(params_specs, BATCH_SPEC), out_specs=P(), check_vma=False
        )
    )
