"""How our models create parameters: boxed, so that each carries the mesh axes it is cut over."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# The mesh axes that a dimension is cut over: one, several, or None.
Axes = str | tuple[str, ...] | None


def boxed_parameter(
    module: nn.Module,
    name: str,
    init_fn: Callable,
    shape: tuple[int, ...],
    axis_names: tuple[Axes, ...],
) -> jax.Array:
    """Creates or reads a float32 parameter that is stored in an `nn.Partitioned` box.

    Args:
        module: The module that owns the parameter.
        name: Its name in the module.
        init_fn: `init_fn(rng, shape, dtype)`.
        shape: Its shape on this device: outside of `shard_map`, where parameters are initialised,
            the global one.
        axis_names: For every dimension the mesh axes that it is cut over.

    Returns:
        The array itself. A parameter that is given without its box does as well.
    """
    init_fn = nn.with_partitioning(init_fn, axis_names)
    box = module.param(name, init_fn, shape, jnp.float32, unbox=False)
    # `nn.Partitioned.unbox` would add a sharding constraint, an error inside `shard_map`.
    return box.value if isinstance(box, nn.Partitioned) else box
