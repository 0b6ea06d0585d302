"""Tests of the permutation and its hash."""

import math

import numpy as np
import pytest

from xlstm.dataset.permutation import hashed_order, shuffled_index, splitmix64


def test_the_published_outputs():
    # From seed 1234567, as its authors' C code prints them.
    found = [splitmix64(1234567, index) for index in range(5)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_hashed_order_never_changes():
    # The first outputs from seed 0, as its authors publish them. Resumed runs, and comparisons of
    # validation losses, rely on the order.
    hashes = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(0, np.arange(3, dtype=np.uint64)).tolist() == hashes
    assert hashed_order(3).tolist() == [2, 1, 0]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_hashes_of_arrays_are_as_those_of_ints(seed):
    indices = [0, 1, 2**31, 2**63, 2**64 - 1]
    expected = [splitmix64(seed, index) for index in indices]
    arrays = np.array(indices, np.uint64)
    assert splitmix64(seed, arrays).dtype == np.uint64
    assert splitmix64(seed, arrays).tolist() == expected
    assert splitmix64(np.full(5, seed, np.uint64), arrays).tolist() == expected


_POWERS = [2**k + offset for k in range(9, 23) for offset in (-1, 0, 1)]


def _order(first, count, length, seed):
    """Returns the items at some positions, computed in pieces that fit the CPU's cache."""
    pieces = range(first, first + count, 4096)
    stops = [min(start + 4096, first + count) for start in pieces]
    return np.concatenate(
        [
            shuffled_index(np.arange(start, stop, dtype=np.uint64), length, seed)
            for start, stop in zip(pieces, stops, strict=True)
        ]
    ).astype(np.int64)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_epochs_of_short_lengths_are_permutations(seed):
    for length in range(1, 301):
        for epoch in (0, 1, 10**9):
            order = _order(epoch * length, length, length, seed)
            np.testing.assert_array_equal(np.sort(order), np.arange(length), err_msg=f"{length}")


def test_epochs_around_powers_of_two_are_permutations():
    """Powers of 4 too, at which Grain's shuffle is not a permutation."""
    for length in _POWERS:
        counts = np.bincount(_order(0, length, length, seed=length), minlength=length)
        assert counts.size == length and np.all(counts == 1), length


@pytest.mark.parametrize("length", [1, 2, 3, 9, 300, 65_537, 2**22 - 1, 10**12])
@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_arrays_are_as_ints(length, seed):
    positions = [0, 1, length - 1, length, 7 * length + length // 2, 2**52 - 1]
    found = shuffled_index(np.array(positions, np.uint64), length, seed)
    assert found.dtype == np.uint64
    assert found.tolist() == [shuffled_index(position, length, seed) for position in positions]
    assert all(type(shuffled_index(position, length, seed)) is int for position in positions)


def test_the_order_never_changes():
    # Resumed runs rely on it.
    assert [shuffled_index(position, 10, 3) for position in range(20)] == [
        *(5, 0, 6, 4, 7, 1, 2, 8, 9, 3),
        *(1, 2, 6, 3, 9, 0, 5, 4, 8, 7),
    ]


@pytest.mark.parametrize("length", [2, 3, 4, 6, 7, 12, 50])
def test_every_item_comes_at_every_place(length):
    by_epoch = _order(0, 10_000 * length, length, seed=1).reshape(-1, length)
    by_seed = np.stack([_order(0, length, length, seed) for seed in range(2000)])
    for orders in (by_epoch, by_seed):
        pairs = orders + length * np.arange(length)
        counts = np.bincount(pairs.ravel(), minlength=length**2)
        mean = len(orders) / length
        chi_squared = np.sum((counts - mean) ** 2) / mean
        # Row and column sums are fixed, so this many counts are free.
        free = (length - 1) ** 2
        assert chi_squared < free + 5 * math.sqrt(2 * free)


def test_all_orders_of_a_few_items_come_about_equally_often():
    orders = _order(0, 4 * 24_000, 4, seed=1).reshape(-1, 4)
    _, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
    assert counts.size == 24 and np.all(np.abs(counts - 1000) < 5 * math.sqrt(1000))


@pytest.mark.parametrize("length", [1000, 65_537, 500_000])
def test_orders_look_random_and_unrelated(length):
    positions = np.arange(length)
    orders = [
        _order(epoch * length, length, length, seed) for seed in (0, 1, 2) for epoch in (0, 1, 2)
    ]
    root = math.sqrt(length)
    for order in orders:
        # The mean distances of a random order, within five standard deviations.
        assert abs(np.mean(np.abs(order - positions)) / length - 1 / 3) < 5 * 0.25 / root
        assert abs(np.mean(np.abs(np.diff(order))) / length - 1 / 3) < 5 * 0.25 / root
        assert np.sum(order == positions) < 12  # One is expected.
        for lag in (1, 2, math.isqrt(length), math.isqrt(length) + 1):
            assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 5 / root
        # Every part of an epoch holds items from every part equally.
        cells = np.bincount(8 * (8 * positions // length) + 8 * order // length, minlength=64)
        assert np.all(np.abs(cells - length / 64) < 5 * math.sqrt(length / 64))
    correlations = np.corrcoef([positions, *orders])[np.triu_indices(len(orders) + 1, 1)]
    assert np.abs(correlations).max() < 5 / root
    for number, order in enumerate(orders):
        assert all(np.sum(order == other) < 12 for other in orders[:number])
