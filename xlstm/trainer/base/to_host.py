"""Brings arrays of a mesh to the processes."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole of an array; all processes that have a part of it must ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
