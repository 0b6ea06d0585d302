"""The compiled steps of training and evaluation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.distributed.data_parallel import sum_gradients
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.distributed.single_gpu import accumulate_gradients_scan
from xlstm.trainer.base.param_utils import (
    get_grad_norms,
    get_param_norms,
    get_sharded_global_norm,
)

# Partition spec of every leaf of a batch, `(B, T)`: examples and tokens are sharded.
BATCH_SPEC = P(BATCH_AXES, "cp")
_ROWS = 1  # The axis of the examples in a carried state.


def create_train_step(
    mesh: Mesh,
    state_specs: PyTree,
    loss_metrics: Callable[..., tuple[Metrics, PyTree]],
    count_targets: Callable[[PyTree], jax.Array],
    update: Callable[..., tuple[TrainState, Metrics]],
    num_minibatches: int,
    norms_per_param: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Creates the compiled training step.

    Args:
        mesh: The mesh.
        state_specs: Partition specs of the train state.
        loss_metrics: `loss_metrics(params, apply_fn, batch, keys, carried_state)` computes the
            metrics of a minibatch, which are summed over the minibatches and over all devices of
            the mesh, and the carried state after it. The metric `loss` is the pair (sum over the
            targets, their number). `keys` holds a random key per example, made from `state.rng`,
            the step, and the example's index in the global batch. `carried_state` holds the rows of
            `TrainState.carried_state` of the same examples.
        count_targets: Returns the number of targets in a batch.
        update: Computes the next state (see `update_state`) from a state, gradients, their global
            norm, the summed loss, and a function that computes such norms.
        num_minibatches: Number of minibatches in each device's part of a batch.
        norms_per_param: Whether the metrics include the norms of single parameters.

    Returns:
        A function `(state, batch, requests=None) -> (state, metrics)` that consumes the state.
        `batch` is a global batch, and `requests` is `Requests.current()`. The metrics are those of
        `loss_metrics` and `update`, the norms of gradients and parameters (`grad_norm`,
        `param_norm`), and, with `requests`, the largest `request` of all processes.
    """
    # Gradients depend on neither of these.
    without = {"opt_state": None, "params_ema": None}
    compute_gradients = jax.shard_map(
        functools.partial(
            _compute_gradients,
            axis_names=mesh.axis_names,
            loss_metrics=loss_metrics,
            count_targets=count_targets,
            num_minibatches=num_minibatches,
            norms_per_param=norms_per_param,
        ),
        mesh=mesh,
        in_specs=(state_specs.replace(**without), BATCH_SPEC, P(mesh.axis_names)),
        out_specs=(state_specs.params, P(), state_specs.carried_state),
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
        grads, metrics, carried = compute_gradients(state.replace(**without), batch, requests)
        total_loss, _ = metrics["loss"]
        state, update_metrics = update(state, grads, metrics["grad_norm"], total_loss, global_norm)
        state = state.replace(carried_state=_restart_nonfinite_rows(carried))
        return state, metrics | update_metrics

    return train_step


def _compute_gradients(
    state: TrainState,
    batch: PyTree,
    requests: jax.Array | None,
    *,
    axis_names: tuple[str, ...],
    loss_metrics: Callable[..., tuple[Metrics, PyTree]],
    count_targets: Callable[[PyTree], jax.Array],
    num_minibatches: int,
    norms_per_param: bool,
) -> tuple[PyTree, Metrics, PyTree]:
    """Computes gradients, metrics and carried state of a global batch inside `shard_map`.

    The loss of a minibatch is `sum * num_minibatches / targets of the global batch`. Its mean over
    the minibatches, summed over the devices, is the loss per target for any division of the batch.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    indices = lax.axis_index(BATCH_AXES) * batch_size + jnp.arange(batch_size)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(indices)
    num_targets = jnp.maximum(lax.psum(count_targets(batch), (*BATCH_AXES, "cp")), 1)

    def loss_fn(params, apply_fn, minibatch, rng):
        del rng  # Every example has its own key, which does not depend on the mesh.
        tokens, keys, carried = minibatch
        carried = jax.tree.map(lambda x: jnp.moveaxis(x, 0, _ROWS), carried)
        metrics, carried = loss_metrics(params, apply_fn, tokens, keys, carried)
        loss, _ = metrics["loss"]
        return loss * num_minibatches / num_targets, (metrics, carried)

    carried = jax.tree.map(lambda x: jnp.moveaxis(x, _ROWS, 0), state.carried_state)
    grads, metrics, carried = accumulate_gradients_scan(
        state, (batch, keys, carried), rng, num_minibatches, loss_fn
    )
    carried = jax.tree.map(_merge_minibatches, carried)
    grads = sum_gradients(grads, axis_names)
    metrics = lax.psum(metrics, axis_names)
    metrics |= get_grad_norms(grads, norms_per_param)
    metrics |= get_param_norms(state.params, norms_per_param)
    if requests is not None:
        metrics["request"] = lax.pmax(requests[0], axis_names)
    return grads, metrics, carried


def _merge_minibatches(x: jax.Array) -> jax.Array:
    """Merges the leading axis of minibatches with the axis of the rows."""
    x = jnp.moveaxis(x, 0, _ROWS)
    return x.reshape(*x.shape[:_ROWS], -1, *x.shape[_ROWS + 2 :])


def _restart_nonfinite_rows(carried_state: PyTree) -> PyTree:
    """Replaces the carried states of rows that are not finite with the zero state."""

    def is_finite(x: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(x), axis=[axis for axis in range(x.ndim) if axis != _ROWS])

    leaves = jax.tree.leaves(carried_state)
    if not leaves:
        return carried_state
    keep = functools.reduce(jnp.logical_and, map(is_finite, leaves))
    return jax.tree.map(
        lambda x: jnp.where(jnp.expand_dims(keep, [0, *range(2, x.ndim)]), x, 0), carried_state
    )


def _create_global_norm(mesh: Mesh, params_specs: PyTree) -> Callable[[PyTree], jax.Array]:
    """Creates a function that computes the norm of a tree sharded like the parameters."""
    return jax.shard_map(
        lambda tree: get_sharded_global_norm(tree)[0],
        mesh=mesh,
        in_specs=(params_specs,),
        out_specs=P(),
        check_vma=False,
    )


def create_eval_step(
    mesh: Mesh,
    params_specs: PyTree,
    eval_fn: Callable[[PyTree, PyTree, PyTree], tuple[Metrics, PyTree]],
    carried_specs: PyTree = None,
) -> Callable[[PyTree, PyTree, PyTree], tuple[Metrics, PyTree]]:
    """Creates the compiled evaluation step.

    Args:
        mesh: The mesh.
        params_specs: Partition specs of the parameters.
        eval_fn: Computes metrics from parameters, this device's part of a batch, and the carried
            state before it, and returns the carried state after it as well. Metrics are summed over
            all devices of the mesh.
        carried_specs: Partition specs of the carried state; None if there is none.

    Returns:
        A function `(params, batch, carried_state) -> (metrics, carried_state)` of a global batch,
        which consumes the carried state.
    """

    def step(params: PyTree, batch: PyTree, carried: PyTree) -> tuple[Metrics, PyTree]:
        metrics, carried = eval_fn(params, batch, carried)
        return lax.psum(metrics, mesh.axis_names), carried

    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(params_specs, BATCH_SPEC, carried_specs),
            out_specs=(P(), carried_specs),
            check_vma=False,
        ),
        donate_argnums=2,
    )
