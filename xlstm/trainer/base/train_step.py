"""The training and evaluation steps: one `shard_map` over the whole mesh each."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.distributed.data_parallel import sum_gradients
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.distributed.single_gpu import LossFn, accumulate_gradients
from xlstm.trainer.base.param_utils import get_grad_norms, get_param_norms

# Partition spec of every leaf of a batch: the examples are divided, the rest is whole.
BATCH_SPEC = P(BATCH_AXES)


def create_train_step(
    mesh: Mesh,
    state_specs: PyTree,
    create_loss_fn: Callable[[int, jax.Array], LossFn],
    count_targets: Callable[[PyTree], jax.Array],
    schedule: optax.Schedule,
    num_minibatches: int,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Makes the compiled training step.

    Args:
        mesh: The mesh.
        state_specs: Partition specs of the train state.
        create_loss_fn: Makes the loss from the numbers of minibatches and of targets of the whole
            global batch. Its batch is a pair, the examples and a random key for each, which depends
            on the step and on the example's place in the global batch alone. It returns what this
            device contributes: loss and metrics are summed over all devices of the mesh.
        count_targets: Counts the targets in a batch.
        schedule: Learning rate as a function of the step, for the metrics.
        num_minibatches: Number of minibatches that each device's share of a batch is cut into.

    Returns:
        A function of a state, which it consumes, and a global batch, that returns the next state
        and the metrics: those of the loss function, `grad_norm`, `param_norm` and `lr`.
    """

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
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
        metrics |= get_grad_norms(grads) | get_param_norms(state.params)
        metrics["lr"] = schedule(state.step)
        return state.apply_gradients(grads=grads), metrics

    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(state_specs, BATCH_SPEC),
        out_specs=(state_specs, P()),
        check_vma=False,
    )
    return jax.jit(step, donate_argnums=0)


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
