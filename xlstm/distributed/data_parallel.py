"""Data parallelism with sharded parameters (FSDP), and the sum of gradients over replicas.

A parameter is an `nn.Partitioned` box whose names are the mesh axes that its dimensions are sharded
over. Outside of `shard_map`, where shapes are global, `shard_parameters` adds the axis `fsdp` to
the names of large parameters. Inside, `gather_on_use` gathers the parameters of a module while it
runs. The transpose of a gather scatters, so gradients arrive summed over the axis and sharded like
their parameters.

References:
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020
    (stage 3).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import axis_size

Target = TypeVar("Target", bound=Callable)


def is_partitioned(x: object) -> bool:
    """Returns whether `x` is a boxed parameter."""
    return isinstance(x, nn.Partitioned)


def axes_of(names: Sequence[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """Returns the mesh axes in the names of a box, in order, without None and nested tuples."""
    flat = []
    for name in names:
        flat += name if isinstance(name, tuple) else [name]
    return tuple(name for name in flat if name is not None)


def shard_parameters(
    params: PyTree,
    num_shards: int,
    *,
    min_weight_size: int,
    axis_name: str = "fsdp",
    stack_axis: str = "pp",
) -> PyTree:
    """Shards the largest free dimension of each large parameter, by naming the mesh axis there.

    Args:
        params: Tree with `nn.Partitioned` boxes of global shapes, possibly abstract. Leaves without
            a box stay whole.
        num_shards: Size of the mesh axis; only dimensions that are multiples of it are sharded.
        min_weight_size: Number of elements below which a parameter stays whole. Dimensions along
            `stack_axis` do not count, since the blocks of a stack are gathered one at a time.
        axis_name: Mesh axis to shard over.
        stack_axis: Mesh axis that stacks of blocks are sharded over.

    Returns:
        The tree, with the mesh axis among the names of the sharded boxes.
    """

    def shard(box: PyTree) -> PyTree:
        if not is_partitioned(box) or axis_name in axes_of(box.names):
            return box
        sizes = list(zip(box.value.shape, box.names, strict=True))
        free = [
            (size, -dimension)
            for dimension, (size, name) in enumerate(sizes)
            if name is None and size % num_shards == 0
        ]
        weight_size = math.prod(size for size, name in sizes if name != stack_axis)
        if num_shards == 1 or not free or weight_size < min_weight_size:
            return box
        names = list(box.names)
        names[-max(free)[1]] = axis_name
        return box.replace(names=tuple(names))

    return jax.tree.map(shard, params, is_leaf=is_partitioned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
    shard: jax.Array, axis_name: str, dimension: int, gather_dtype: jnp.dtype, scatter_dtype
) -> jax.Array:
    whole = lax.all_gather(shard.astype(gather_dtype), axis_name, axis=dimension, tiled=True)
    return whole.astype(shard.dtype)


def _gather_fwd(shard, axis_name, dimension, gather_dtype, scatter_dtype):
    return _gather(shard, axis_name, dimension, gather_dtype, scatter_dtype), None


def _gather_bwd(axis_name, dimension, gather_dtype, scatter_dtype, residuals, gradient):
    del gather_dtype, residuals
    shard = lax.psum_scatter(
        gradient.astype(scatter_dtype), axis_name, scatter_dimension=dimension, tiled=True
    )
    return (shard.astype(gradient.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_parameters(
    params: PyTree,
    *,
    axis_name: str = "fsdp",
    gather_dtype: jnp.dtype = jnp.float32,
    scatter_dtype: jnp.dtype = jnp.float32,
) -> PyTree:
    """Gathers parameters that are sharded over a mesh axis, inside of `shard_map`.

    Args:
        params: Tree with boxes that hold local shards.
        axis_name: Mesh axis to gather over.
        gather_dtype: Type in which shards are sent.
        scatter_dtype: Type in which the backward pass sends and sums gradients.

    Returns:
        The tree, with boxes that hold whole parameters and do not name the axis.

    Raises:
        ValueError: If a dimension is sharded over this axis and another one.
    """

    def gather(box: PyTree) -> PyTree:
        if not is_partitioned(box) or axis_name not in axes_of(box.names):
            return box
        if axis_name not in box.names:
            raise ValueError(
                f"a parameter with the names {box.names} cannot be gathered over {axis_name}:"
                " expected a dimension that is sharded over this axis alone"
            )
        dimension = box.names.index(axis_name)
        whole = _gather(box.value, axis_name, dimension, gather_dtype, scatter_dtype)
        names = tuple(None if name == axis_name else name for name in box.names)
        return box.replace(value=whole, names=names)

    return jax.tree.map(gather, params, is_leaf=is_partitioned)


def gather_on_use(
    target: Target,
    *,
    axis_name: str = "fsdp",
    gather_dtype: jnp.dtype = jnp.float32,
    scatter_dtype: jnp.dtype = jnp.float32,
) -> Target:
    """Transforms a module class, or a function of a module, to gather its parameters when called.

    An `nn.remat` around it gathers again in the backward pass, and an `nn.scan` gathers one block
    at a time. Outside of `shard_map`, where parameters are initialized, this does nothing.

    Args:
        target: The class, or a function whose first argument is a module.
        axis_name: See `gather_parameters`.
        gather_dtype: See `gather_parameters`.
        scatter_dtype: See `gather_parameters`.

    Returns:
        The transformed target; the target itself if the axis has size 1.
    """
    if axis_size(axis_name) == 1:
        return target
    gather = functools.partial(
        gather_parameters,
        axis_name=axis_name,
        gather_dtype=gather_dtype,
        scatter_dtype=scatter_dtype,
    )
    return nn.map_variables(target, "params", trans_in_fn=gather)


def sum_gradients(grads: PyTree, axis_names: Sequence[str]) -> PyTree:
    """Sums gradients over the mesh axes that their parameters are not sharded over.

    Leaves with the same axes are summed in one collective.

    Args:
        grads: Tree of boxes and arrays, inside of `shard_map`; arrays without a box are replicated.
        axis_names: All mesh axes.

    Returns:
        The tree of summed gradients.
    """
    leaves, structure = jax.tree.flatten(grads, is_leaf=is_partitioned)
    groups = {}
    for index, leaf in enumerate(leaves):
        sharded = axes_of(leaf.names) if is_partitioned(leaf) else ()
        axes = tuple(name for name in axis_names if name not in sharded and axis_size(name) > 1)
        groups.setdefault(axes, []).append(index)
    for axes, indices in groups.items():
        if axes:
            summed = lax.psum([leaves[index] for index in indices], axes)
            for index, leaf in zip(indices, summed, strict=True):
                leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)
