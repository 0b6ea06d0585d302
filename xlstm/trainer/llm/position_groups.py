"""Groups of targets by their position in the document: the first 255, then 256 to 511, and so on.

Each group but the first ends at twice the position at which it starts.
"""

import jax
import jax.numpy as jnp
from jax import lax

_FIRST_BITS = 8  # Positions below 2**8 are one group.
NUM_GROUPS = 32 - _FIRST_BITS


def position_group(positions: jax.Array) -> jax.Array:
    """Returns the group of each position.

    Args:
        positions: Positions of targets, int32 of any shape; those of padding are 0.

    Returns:
        The groups, int32, from 0, below `NUM_GROUPS`.
    """
    return jnp.maximum(32 - _FIRST_BITS - lax.clz(positions), 0)


def group_range(group: int) -> tuple[int, int]:
    """Returns the first and the last position of a group."""
    first = 1 if group == 0 else 2 ** (_FIRST_BITS + group - 1)
    return first, 2 ** (_FIRST_BITS + group) - 1
