"""The training and evaluation steps: one `shard_map` over the whole mesh each."""

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
from xlstm.distributed.single_gpu import LossFn, accumulate_gradients
from xlstm.trainer.base.param_utils import (
    get_grad_norms,
    get_param_norms,
    get_sharded_global_norm,
)

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
        grads, metrics, _ = accumulate_gradients(
            state, (batch, keys), rng, num_minibatches, loss_fn, use_scan=True
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
