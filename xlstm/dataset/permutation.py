"""Pseudorandom permutations of any length, computed index by index from a hash."""

import math
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)

_MASK = 2**64 - 1


def splitmix64(seed: int | np.ndarray, index: Number) -> Number:
    """Returns one output of the SplitMix64 generator, a hash of its index in the stream.

    Args:
        seed: The generator's seed, below 2**64; an int, or a uint64 array.
        index: The index of the output, from 0; an int, or a uint64 array.

    Returns:
        64 bits: an int, or a uint64 array if one was given.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    # uint64 arrays wrap around by themselves; the mask does it for ints.
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


_ROUNDS = 8  # Four for each half.


def hashed_order(length: int) -> np.ndarray:
    """Returns the indices below `length`, `(length,)` int64, in the fixed order of their hashes."""
    return np.argsort(splitmix64(0, np.arange(length, dtype=np.uint64)), kind="stable")


def shuffled_index(position: Number, length: int, seed: int) -> Number:
    """Returns the index of the item at a position of an endless shuffled order.

    Positions `e * length` to `(e + 1) * length - 1` are epoch `e`: each holds every item exactly
    once, in its own order. Time and memory depend neither on the position nor on the length.

    The index is written as two digits of about equal range. Each digit in turn is shifted by a hash
    of the other one. That is invertible, so it permutes all pairs of digits. A pair whose value is
    not below `length` is permuted again until its value is.

    Args:
        position: The position, from 0; an int, or a uint64 array.
        length: The number of items, at least 1.
        seed: The seed of the orders, below 2**64.

    Returns:
        The index of the item, below `length`; an int, or a uint64 array.

    References:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (the generalized Feistel
        network and cycle-walking).
    """
    epoch, index = divmod(position, length)
    key = splitmix64(seed, epoch)
    if isinstance(index, int):
        index = _permuted(index, length, key)
        while index >= length:
            index = _permuted(index, length, key)
        return index
    index = _permuted(index, length, key)
    while (outside := index >= length).any():
        index[outside] = _permuted(index[outside], length, key[outside])
    return index


def _permuted(index: Number, length: int, key: Number) -> Number:
    """Permutes the indices below the product of the digits' ranges, at least `length`."""
    num_left = math.isqrt(length - 1) + 1
    num_right = -(-length // num_left)
    left, right = divmod(index, num_right)
    for number in range(0, _ROUNDS, 2):
        left = (left + splitmix64(key, right * _ROUNDS + number) % num_left) % num_left
        right = (right + splitmix64(key, left * _ROUNDS + number + 1) % num_right) % num_right
    return left * num_right + right
