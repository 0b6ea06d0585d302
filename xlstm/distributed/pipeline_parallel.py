"""Pipeline parallelism: stages of a network on the devices of a mesh axis (GPipe).

The batch is cut into micro-batches, which follow each other through the stages: at every tick each
device runs its stage on one micro-batch and hands the result on to the next. With `n` stages and
`m` micro-batches there are `m + n - 1` ticks, in `n - 1` of which a device has nothing to do, the
bubble.

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
from xlstm.distributed.mesh import vary_alike, varying_axes


def bubble_fraction(num_stages: int, num_microbatches: int) -> float:
    """The share of its ticks for which a device of a pipeline has nothing to do.

    Args:
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.

    Returns:
        A fraction, 0 for one stage.
    """
    return (num_stages - 1) / (num_microbatches + num_stages - 1)


def execute_pipeline_step(
    module: nn.Module, state: PyTree, input: PyTree, *args: Any, model_axis_name: str, **kwargs: Any
) -> tuple[PyTree, PyTree]:
    """Runs one tick: every device's stage on one micro-batch.

    Args:
        module: This device's stage; `module(x, *args, **kwargs)` returns a tree like `x`.
        state: What came from the stage before at the last tick.
        input: The micro-batch that enters the first stage now; others ignore it.
        *args: Handed to the stage.
        model_axis_name: The mesh axis of the stages.
        **kwargs: Handed to the stage.

    Returns:
        What comes from the stage before for the next tick, and the output: that of the stage on the
        last device, zeros on the others.

    Raises:
        ValueError: If the stage returns something else than a tree like `x`.
    """
    num_stages = lax.axis_size(model_axis_name)
    stage = lax.axis_index(model_axis_name)
    state = _select(stage == 0, input, state)
    state = _run_stage(module, state, *args, **kwargs)
    output = _select(stage == num_stages - 1, state, jax.tree.map(jnp.zeros_like, state))
    to_next = [(place, (place + 1) % num_stages) for place in range(num_stages)]
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

    Mutable variables pass from one micro-batch to the next, and what a stage does in the bubble
    leaves them as they are. Variables that a stage makes, such as `intermediates`, are stacked on a
    new leading axis of micro-batches. Each tick has a random key of its own; whoever wants other
    keys on other devices folds `lax.axis_index` into them, as always in `shard_map`.

    Args:
        module: This device's stage, bound in a parent; `module(x, *args, **kwargs)` returns a tree
            like `x`.
        x: Tree of arrays with the examples on the leading axis, the same on all stages. Everything
            that belongs to an example is in here.
        *args: Handed unchanged to every call of the stage.
        num_microbatches: Number of equal parts into which `x` is cut.
        model_axis_name: The mesh axis of the stages.
        **kwargs: Handed unchanged to every call of the stage.

    Returns:
        A tree like `x` on the device of the last stage, zeros on the others.

    Raises:
        ValueError: If the examples do not divide into `num_microbatches`, or the stage returns
            something else than a tree like `x`.
    """
    num_stages, stage = lax.axis_size(model_axis_name), lax.axis_index(model_axis_name)
    num_ticks = num_microbatches + num_stages - 1
    microbatches = split_batch(x, num_microbatches, "microbatches")
    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    if module.is_initializing():
        _make_variables(module, first, *args, model_axis_name=model_axis_name, **kwargs)
        return jax.tree.map(jnp.zeros_like, x)  # A stage returns a tree like its input.

    def tick(module: nn.Module, state: PyTree, number: jax.Array) -> tuple[PyTree, PyTree]:
        # The last micro-batch is repeated in the bubble rather than padded with zeros, from which a
        # stage might make something that is not finite.
        place = jnp.minimum(number, num_microbatches - 1)
        input = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), microbatches
        )
        is_busy = (number >= stage) & (number < stage + num_microbatches)
        step = _updating_variables_if(is_busy, execute_pipeline_step, carried)
        return step(module, state, input, *args, model_axis_name=model_axis_name, **kwargs)

    # Variables that there are and that may change pass from micro-batch to micro-batch; those that
    # a stage makes on the way are stacked; the others are the same for all.
    variables = module.scope.root.variables()  # The stage may use modules of its parents.
    there = ("params", *(name for name in variables if name != "params"))
    carried = tuple(name for name in there[1:] if module.is_mutable_collection(name))
    fixed = tuple(name for name in there if name not in carried)
    axes = varying_axes((x, variables, args, kwargs)).union([model_axis_name])
    run = nn.scan(
        tick,
        variable_broadcast=fixed,
        variable_carry=carried,
        variable_axes={nn.DenyList(there): 0},
        split_rngs={True: True},
        length=num_ticks,
    )
    run = nn.map_variables(
        run,
        nn.DenyList(fixed),
        trans_in_fn=lambda variables: vary_alike(variables, axes),
        trans_out_fn=lambda variables: {
            name: tree if name in there else _without_bubble(tree, stage, num_microbatches)
            for name, tree in variables.items()
        },
        mutable=True,
    )
    _, outputs = run(module, vary_alike(first, axes), jnp.arange(num_ticks))
    return jax.tree.map(lambda leaf: leaf[num_stages - 1 :].reshape(-1, *leaf.shape[2:]), outputs)


def _make_variables(
    module: nn.Module, x: PyTree, *args: Any, model_axis_name: str, **kwargs: Any
) -> None:
    """Calls a stage to make its variables, which are its own even where all are zero."""
    make = nn.map_variables(
        lambda module: _run_stage(module, x, *args, **kwargs),
        trans_out_fn=lambda variables: vary_alike(variables, [model_axis_name]),
        mutable=True,
    )
    make(module)


def _without_bubble(tree: PyTree, stage: jax.Array, num_microbatches: int) -> PyTree:
    """Of what a stage made at every tick, that of the micro-batches."""
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
            f"a stage of the pipeline returned {returned} for {given}; it must return a tree like"
            " its input"
        )
    return y


def _updating_variables_if(
    condition: jax.Array, fn: Callable[..., Any], collections: Sequence[str]
) -> Callable[..., Any]:
    """Lets a function of a module change variables of some collections only on a condition."""
    if not collections:
        return fn
    before = None

    def remember(variables: PyTree) -> PyTree:
        nonlocal before
        before = variables
        return variables

    def choose(variables: PyTree) -> PyTree:
        return _select(condition, variables, before)

    return nn.map_variables(fn, tuple(collections), remember, choose, mutable=True)


def _select(condition: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


class PipelineModule(nn.Module):
    """A pipeline whose stages are all made by one function.

    Initialised inside of `shard_map`, each device makes the parameters of its own stage; fold
    `lax.axis_index(model_axis_name)` into the key, so that stages begin differently.

    Attributes:
        model_axis_name: The mesh axis of the stages.
        num_microbatches: Number of equal parts into which the input is cut.
        module_fn: Makes the stage.
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
