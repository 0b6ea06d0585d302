"""Pipeline parallelism: stages of a network on the devices of a mesh axis (GPipe).

The batch is split into micro-batches, which pass through the stages one after the other: at every
tick each device runs its stage on one micro-batch and sends the output to the next device. With `n`
stages and `m` micro-batches there are `m + n - 1` ticks. Each device is idle during `n - 1` of
them, the bubble.

All functions here run inside of `shard_map`.

References:
    Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism",
    2019, section 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PyTree
from xlstm.distributed.batches import split_batch
from xlstm.distributed.mesh import match_varying_axes, varying_axes


def bubble_fraction(num_stages: int, num_microbatches: int) -> float:
    """Returns the fraction of the ticks during which a device is idle.

    Args:
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.

    Returns:
        The fraction; 0 for one stage.
    """
    return (num_stages - 1) / (num_microbatches + num_stages - 1)


def execute_pipeline_step(
    module: nn.Module, state: PyTree, input: PyTree, *args: Any, model_axis_name: str, **kwargs: Any
) -> tuple[PyTree, PyTree]:
    """Runs one tick: each device runs its stage on one micro-batch.

    Args:
        module: Local stage; `module(x, *args, **kwargs)` returns a tree like `x`.
        state: Micro-batch received from the previous stage at the last tick.
        input: Micro-batch that enters the first stage now; other stages ignore it.
        *args: Arguments of the stage.
        model_axis_name: Mesh axis of the stages.
        **kwargs: Keyword arguments of the stage.

    Returns:
        The micro-batch received from the previous stage for the next tick, and the output: that of
        the stage on the last device, zeros on the others.

    Raises:
        ValueError: If the stage does not return a tree like its input.
    """
    num_stages = lax.axis_size(model_axis_name)
    stage = lax.axis_index(model_axis_name)
    state = _select(stage == 0, input, state)
    state = _run_stage(module, state, *args, **kwargs)
    output = _select(stage == num_stages - 1, state, jax.tree.map(jnp.zeros_like, state))
    to_next = [(device, (device + 1) % num_stages) for device in range(num_stages)]
    return lax.ppermute(state, model_axis_name, to_next), output


def execute_pipeline(
    module: nn.Module,
    x: PyTree,
    *args: Any,
    num_microbatches: int,
    model_axis_name: str,
    **kwargs: Any,
) -> PyTree:
    """Runs a batch through the stages on the devices of a mesh axis.

    Mutable variables pass from one micro-batch to the next; calls of a stage in the bubble do not
    change them. Variables that a stage creates, such as `intermediates`, are stacked on a new
    leading axis of micro-batches. Each tick has its own random key, the same on all devices; to get
    different keys, fold in `lax.axis_index`, as always in `shard_map`.

    Args:
        module: Local stage, bound in a parent; `module(x, *args, **kwargs)` returns a tree like
            `x`.
        x: Tree of arrays with the examples on the leading axis, the same on all stages. It must
            contain all data that differs by example.
        *args: Arguments that are passed unchanged to every call of the stage.
        num_microbatches: Number of equal parts that `x` is split into.
        model_axis_name: Mesh axis of the stages.
        **kwargs: Keyword arguments that are passed unchanged to every call of the stage.

    Returns:
        A tree like `x` on the device of the last stage, zeros on the others.

    Raises:
        ValueError: If the number of examples is not a multiple of `num_microbatches`, or the stage
            does not return a tree like its input.
    """
    num_stages, stage = lax.axis_size(model_axis_name), lax.axis_index(model_axis_name)
    num_ticks = num_microbatches + num_stages - 1
    microbatches = split_batch(x, num_microbatches, "microbatches")
    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    if module.is_initializing():
        _make_variables(module, first, *args, model_axis_name=model_axis_name, **kwargs)
        return jax.tree.map(jnp.zeros_like, x)  # A stage returns a tree like its input.

    def tick(module: nn.Module, state: PyTree, number: jax.Array) -> tuple[PyTree, PyTree]:
        # The bubble repeats the last micro-batch, since a stage might not be finite for zeros.
        index = jnp.minimum(number, num_microbatches - 1)
        input = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), microbatches
        )
        is_busy = (number >= stage) & (number < stage + num_microbatches)
        step = _updating_variables_if(is_busy, execute_pipeline_step, carried)
        return step(module, state, input, *args, model_axis_name=model_axis_name, **kwargs)

    # Existing mutable variables pass from micro-batch to micro-batch, variables that a stage
    # creates are stacked, and all others are shared.
    variables = module.scope.root.variables()  # The stage can use modules of its parents.
    existing = ("params", *(name for name in variables if name != "params"))
    carried = tuple(name for name in existing[1:] if module.is_mutable_collection(name))
    fixed = tuple(name for name in existing if name not in carried)
    axes = varying_axes((x, variables, args, kwargs)).union([model_axis_name])
    run = nn.scan(
        tick,
        variable_broadcast=fixed,
        variable_carry=carried,
        variable_axes={nn.DenyList(existing): 0},
        split_rngs={True: True},
        length=num_ticks,
    )
    run = nn.map_variables(
        run,
        nn.DenyList(fixed),
        trans_in_fn=lambda variables: match_varying_axes(variables, axes),
        trans_out_fn=lambda variables: {
            name: tree if name in existing else _without_bubble(tree, stage, num_microbatches)
            for name, tree in variables.items()
        },
        mutable=True,
    )
    _, outputs = run(module, match_varying_axes(first, axes), jnp.arange(num_ticks))
    return jax.tree.map(lambda leaf: leaf[num_stages - 1 :].reshape(-1, *leaf.shape[2:]), outputs)


def _make_variables(
    module: nn.Module, x: PyTree, *args: Any, model_axis_name: str, **kwargs: Any
) -> None:
    """Calls a stage to create its variables, and marks them as local to the stage."""
    make = nn.map_variables(
        lambda module: _run_stage(module, x, *args, **kwargs),
        trans_out_fn=lambda variables: match_varying_axes(variables, [model_axis_name]),
        mutable=True,
    )
    make(module)


def _without_bubble(tree: PyTree, stage: jax.Array, num_microbatches: int) -> PyTree:
    """Selects the ticks that ran micro-batches from values that are stacked over all ticks."""
    return jax.tree.map(
        lambda ticks: lax.dynamic_slice_in_dim(ticks, stage, num_microbatches), tree
    )


def _run_stage(module: nn.Module, x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    """Calls a stage; raises ValueError if it does not return a tree like `x`."""
    y = module(x, *args, **kwargs)
    given, returned = (
        jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", tree) for tree in (x, y)
    )
    if given != returned:
        raise ValueError(
            f"a pipeline stage returned {returned} for the input {given}; expected a tree like the"
            " input"
        )
    return y


def _updating_variables_if(
    condition: jax.Array, fn: Callable[..., Any], collections: Sequence[str]
) -> Callable[..., Any]:
    """Transforms a function of a module to change some collections only on a condition."""
    if not collections:
        return fn
    return map_mutable_variables(
        fn,
        tuple(collections),
        lambda variables: variables,
        lambda before, variables: _select(condition, variables, before),
    )


def map_mutable_variables(
    fn: Callable[..., Any],
    collections: str | Sequence[str],
    read: Callable[[PyTree], PyTree],
    write: Callable[[PyTree, PyTree], PyTree],
) -> Callable[..., Any]:
    """Transforms a function of a module to see a view of some mutable variables.

    Args:
        fn: Function whose first argument is a module.
        collections: The collections of the variables.
        read: Function of the variables that returns the view.
        write: Function of the variables before and of the view after the call that returns the
            variables.

    Returns:
        The transformed function.
    """
    pending = []  # Flax reads, and later writes, the variables of each module involved, in order.

    def read_and_remember(variables: PyTree) -> PyTree:
        pending.append(variables)
        return read(variables)

    def write_back(variables: PyTree) -> PyTree:
        return write(pending.pop(0), variables)

    return nn.map_variables(fn, collections, read_and_remember, write_back, mutable=True)


def _select(condition: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


class PipelineModule(nn.Module):
    """A pipeline whose stages are created by one function.

    Initialize it inside of `shard_map`, where each device creates the parameters of its own stage.
    Fold `lax.axis_index(model_axis_name)` into the key to initialize the stages differently.

    Attributes:
        model_axis_name: Mesh axis of the stages.
        num_microbatches: Number of equal parts that the input is split into.
        module_fn: Function that creates the stage.
    """

    model_axis_name: str
    num_microbatches: int
    module_fn: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """Runs a batch through the stages; see `execute_pipeline`."""
        return execute_pipeline(
            self.module_fn(),
            x,
            *args,
            num_microbatches=self.num_microbatches,
            model_axis_name=self.model_axis_name,
            **kwargs,
        )
