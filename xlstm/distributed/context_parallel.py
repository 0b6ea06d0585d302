"""Context parallelism: the tokens of a sequence are sharded over a mesh axis, in contiguous parts.

A recurrent layer hands a state of fixed size from one part to the next. Parts do not wait for each
other: each device summarizes its own part, the devices combine the summaries of all earlier parts
in a logarithmic number of steps, and each device then starts from the state that results.

All functions here run inside of `shard_map` with `check_vma=False`. If the axis has size 1 or is
not bound, there is no earlier part.

References:
    Hillis and Steele, "Data Parallel Algorithms", 1986 (prefix sums in log steps).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import axis_index, axis_size

# The name of the state before a part for `jax.checkpoint_policies`: a policy that saves it spares
# the backward pass the communication.
INCOMING_STATE = "incoming_state"


def from_earlier(
    x: PyTree, fill: PyTree, axis_name: str, *, distance: int = 1, reverse: bool = False
) -> PyTree:
    """Returns the values of the device a number of parts earlier, in one message.

    Args:
        x: Tree of arrays.
        fill: Tree of scalars, or arrays like those of `x`, for devices without such a part.
        axis_name: The mesh axis.
        distance: How many parts earlier.
        reverse: Whether later parts count as earlier ones.

    Returns:
        A tree like `x`.
    """
    size, index = axis_size(axis_name), axis_index(axis_name)
    if distance >= size:
        return jax.tree.map(lambda x, fill: jnp.full_like(x, fill), x, fill)
    pairs = [(device, device + distance) for device in range(size - distance)]
    has_earlier = index >= distance
    if reverse:
        pairs = [(target, source) for source, target in pairs]
        has_earlier = index < size - distance
    message, unravel = ravel_pytree(x)
    received = unravel(lax.ppermute(message, axis_name, pairs))
    return jax.tree.map(lambda x, fill: jnp.where(has_earlier, x, fill), received, fill)


def combine_earlier(
    combine: Callable[[PyTree, PyTree], PyTree],
    x: PyTree,
    identity: PyTree,
    axis_name: str,
    *,
    reverse: bool = False,
) -> PyTree:
    """Combines the values of all earlier parts, in order.

    With `n` devices, each sends its values `1 + log2(n - 1)` times, rounded up: as often as a
    gather of all values does with up to 4 devices, and far less with many.

    Args:
        combine: Associative function of the values of earlier and of later parts.
        x: Tree of arrays, the values of this device's part.
        identity: Tree of scalars: the value that `combine` leaves any other as it is with.
        axis_name: The mesh axis.
        reverse: Whether later parts count as earlier ones.

    Returns:
        A tree like `x`; `identity` on the first device.
    """
    y, distance = from_earlier(x, identity, axis_name, reverse=reverse), 1
    while distance < axis_size(axis_name) - 1:
        y = combine(from_earlier(y, identity, axis_name, distance=distance, reverse=reverse), y)
        distance *= 2
    return y


def only_in_first_part(x: PyTree, axis_name: str) -> PyTree:
    """Returns a tree of arrays in the first part, and zeros in the others."""
    is_first = axis_index(axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(is_first, x, 0), x)


def of_last_part(x: PyTree, axis_name: str) -> PyTree:
    """Returns the values of the last part on all devices: a tree like `x`."""
    size = axis_size(axis_name)
    if size == 1:
        return x
    is_last = axis_index(axis_name) == size - 1
    message, unravel = ravel_pytree(x)
    return unravel(lax.psum(jnp.where(is_last, message, 0), axis_name))
