"""SplitMix64, spelled out: NumPy's own random streams may change between versions."""

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)

_MASK = 2**64 - 1


def splitmix64(seed: int | np.ndarray, index: Number) -> Number:
    """Returns one output of the SplitMix64 generator, a hash of its place in the stream.

    Args:
        seed: The generator's seed, below 2**64; an int, or a uint64 array.
        index: Which output, counted from 0; an int, or a uint64 array.

    Returns:
        64 bits: an int, or a uint64 array if one was given.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    # Arrays wrap around by themselves, ints have to be cut.
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
