"""Gradient accumulation over the minibatches of each device's batch, on any mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree, TrainState
from xlstm.distributed.batches import split_batch
from xlstm.distributed.mesh import match_varying_axes, varying_axes

# loss_fn(params, apply_fn, batch, rng) -> (loss, (metrics, mutable_variables))
LossFn = Callable[
    [PyTree, Callable, PyTree, PRNGKeyArray], tuple[jax.Array, tuple[Metrics, PyTree]]
]


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def accumulate_gradients_loop(
    state: TrainState,
    batch: PyTree,
    rng: PRNGKeyArray,
    num_minibatches: int,
    loss_fn: LossFn,
) -> tuple[PyTree, Metrics, PyTree]:
    """Accumulates gradients with a Python loop, which compiles each minibatch separately.

    Args:
        state: Train state, whose `params` and `apply_fn` are passed to `loss_fn`.
        batch: Tree of arrays with the examples on the leading axis.
        rng: Random key, split into one per minibatch.
        num_minibatches: Number of equal parts that the batch is split into.
        loss_fn: `loss_fn(params, apply_fn, batch, rng) -> (loss, (metrics, mutable_variables))`.

    Returns:
        The gradients averaged over the minibatches, the metrics summed leaf by leaf, and the
        mutable variables stacked on a new leading axis of size `num_minibatches`.

    Raises:
        ValueError: If the batch size is not a multiple of `num_minibatches`.
    """
    minibatches = split_batch(batch, num_minibatches, "minibatches")
    rngs = jax.random.split(rng, num_minibatches)
    grad_fn = jax.grad(loss_fn, has_aux=True)
    grads, metrics, mutables = None, None, []
    for index in range(num_minibatches):
        minibatch = jax.tree.map(lambda x, index=index: x[index], minibatches)
        new_grads, (new_metrics, mutable) = grad_fn(
            state.params, state.apply_fn, minibatch, rngs[index]
        )
        grads = new_grads if grads is None else _add(grads, new_grads)
        metrics = new_metrics if metrics is None else _add(metrics, new_metrics)
        mutables.append(mutable)
    grads = jax.tree.map(lambda g: g / num_minibatches, grads)
    return grads, metrics, jax.tree.map(lambda *leaves: jnp.stack(leaves), *mutables)


def accumulate_gradients_scan(
    state: TrainState,
    batch: PyTree,
    rng: PRNGKeyArray,
    num_minibatches: int,
    loss_fn: LossFn,
) -> tuple[PyTree, Metrics, PyTree]:
    """Accumulates gradients with `lax.scan`, which compiles one body for all minibatches.

    Arguments and results are those of `accumulate_gradients_loop`.
    """
    minibatches = split_batch(batch, num_minibatches, "minibatches")
    rngs = jax.random.split(rng, num_minibatches)
    grad_fn = jax.grad(loss_fn, has_aux=True)

    # `jit` caches the trace for the scan; `inline` leaves no call in the program.
    @functools.partial(jax.jit, inline=True)
    def minibatch_grads(minibatch, minibatch_rng):
        return grad_fn(state.params, state.apply_fn, minibatch, minibatch_rng)

    def body(carry, xs):
        grads, metrics = carry
        new_grads, (new_metrics, mutable) = minibatch_grads(*xs)
        return (_add(grads, new_grads), _add(metrics, new_metrics)), mutable

    first = jax.tree.map(lambda x: x[0], (minibatches, rngs))
    grads_shape, (metrics_shape, _) = jax.eval_shape(minibatch_grads, *first)
    zeros = jax.tree.map(
        lambda s: match_varying_axes(jnp.zeros(s.shape, s.dtype), varying_axes(s)),
        (grads_shape, metrics_shape),
    )
    (grads, metrics), mutables = lax.scan(body, zeros, (minibatches, rngs))
    return jax.tree.map(lambda g: g / num_minibatches, grads), metrics, mutables


def accumulate_gradients(
    state: TrainState,
    batch: PyTree,
    rng: PRNGKeyArray,
    num_minibatches: int,
    loss_fn: LossFn,
    use_scan: bool = False,
) -> tuple[PyTree, Metrics, PyTree]:
    """Accumulates gradients over minibatches with a loop or, with `use_scan`, a scan.

    Other arguments and results are those of `accumulate_gradients_loop`.
    """
    accumulate = accumulate_gradients_scan if use_scan else accumulate_gradients_loop
    return accumulate(state, batch, rng, num_minibatches, loss_fn)
