"""Data parallelism with sharded parameters (FSDP), and the sum of gradients over replicas.

A parameter is an `nn.Partitioned` box whose names say over which mesh axis each dimension is cut.
`shard_parameters` adds the axis `fsdp` to the names of large parameters, outside of `shard_map`,
where shapes are global; inside, `gather_on_use` brings a module's parameters together while it
runs. A gather's transpose scatters, so that gradients arrive summed over the axis and cut like
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
    """Whether `x` is a boxed parameter."""
    return isinstance(x, nn.Partitioned)


def axes_of(names: Sequence[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """The mesh axes in the names of a box, in order, without None and nested tuples."""
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
    """Names the dimension over which each large parameter is cut: its largest one that is free.

    Args:
        params: Tree with `nn.Partitioned` boxes of global shapes; abstract ones do too. Leaves
            without a box stay whole.
        num_shards: Size of the mesh axis. A dimension that it does not divide is not cut.
        min_weight_size: Parameters with fewer elements stay whole. Dimensions along `stack_axis`
            do not count: the blocks of a stack are gathered one at a time.
        axis_name: The mesh axis.
        stack_axis: The mesh axis over which stacks of blocks are cut.

    Returns:
        The same tree, in which the boxes have more names.
    """

    def shard(box: PyTree) -> PyTree:
        if not is_partitioned(box) or axis_name in axes_of(box.names):
            return box
        sizes = list(zip(box.value.shape, box.names, strict=True))
        free = [
            (size, -place)
            for place, (size, name) in enumerate(sizes)
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
    """Brings parameters that are cut over a mesh axis together, inside of `shard_map`.

    Args:
        params: Tree with boxes that hold this device's shards.
        axis_name: The mesh axis.
        gather_dtype: Type in which shards are sent.
        scatter_dtype: Type in which gradients are sent and summed on their way back.

    Returns:
        The same tree, whose boxes hold whole parameters and do not name the axis.

    Raises:
        ValueError: If a dimension is cut over the axis and another one.
    """

    def gather(box: PyTree) -> PyTree:
        if not is_partitioned(box) or axis_name not in axes_of(box.names):
            return box
        if axis_name not in box.names:
            raise ValueError(
                f"a parameter with the names {box.names} cannot be gathered over {axis_name}: no"
                " other axis may cut the same dimension"
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
    """Lets a module class, or a function of a module, gather its parameters when it is called.

    Around it `nn.remat` gathers again in the backward pass, and `nn.scan` gathers one block at a
    time. Parameters are initialised outside of `shard_map`, where this does nothing.

    Args:
        target: The class, or a function whose first argument is a module.
        axis_name: The mesh axis, see `gather_parameters`.
        gather_dtype: See `gather_parameters`.
        scatter_dtype: See `gather_parameters`.

    Returns:
        The same with parameters gathered; the target itself where the axis has size 1.
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
    """Sums gradients over the mesh axes that their parameters are not cut over.

    Args:
        grads: Tree of boxes and arrays, inside of `shard_map`; an array counts as whole.
        axis_names: All mesh axes.

    Returns:
        The same tree. Leaves with the same axes are summed together.
    """
    leaves, structure = jax.tree.flatten(grads, is_leaf=is_partitioned)
    groups = {}
    for place, leaf in enumerate(leaves):
        cut = axes_of(leaf.names) if is_partitioned(leaf) else ()
        axes = tuple(name for name in axis_names if name not in cut and axis_size(name) > 1)
        groups.setdefault(axes, []).append(place)
    for axes, places in groups.items():
        if axes:
            summed = lax.psum([leaves[place] for place in places], axes)
            for place, leaf in zip(places, summed, strict=True):
                leaves[place] = leaf
    return jax.tree.unflatten(structure, leaves)
