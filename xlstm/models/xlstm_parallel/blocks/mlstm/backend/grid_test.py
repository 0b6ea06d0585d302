"""Tests of the chunkwise backend for all combinations of lengths, chunk sizes and options."""

import functools
import itertools

import jax
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)

KEPT = ("keep_G", "keep_gates", "keep_M", "keep_c")


def solve(config, problem, reset=None):
    function = mlstm_fwbw_custom_grad(config)
    return testing.outputs_and_gradients(
        lambda arguments, reset: function(*arguments, reset=reset),
        problem.arguments,
        reset,
        problem.cotangents,
    )


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 16, 64, 512])
@pytest.mark.parametrize("time", [1, 2, 5, 63, 64, 65, 200, 1000])
def test_every_length_and_chunk_size(time, chunk_size):
    problem = testing.problem(time, with_reset=False)
    config = mLSTMBackendFwbwConfig(chunk_size, return_state=True, stabilize_correctly=True)
    testing.assert_solves(problem, *solve(config, problem))


@functools.cache
def solve_with(stabilize_correctly, *kept):
    problem = testing.problem(17, with_reset=True, stabilize_correctly=stabilize_correctly)
    config = mLSTMBackendFwbwConfig(
        chunk_size=7,
        return_state=True,
        stabilize_correctly=stabilize_correctly,
        **dict(zip(KEPT, kept, strict=True)),
    )
    return solve(config, problem, problem.reset)


@pytest.mark.parametrize("stabilize_correctly", [False, True])
@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=4)))
def test_every_option(kept, stabilize_correctly):
    problem = testing.problem(17, with_reset=True, stabilize_correctly=stabilize_correctly)
    actual = solve_with(stabilize_correctly, *kept)
    testing.assert_solves(problem, *actual)
    # The kept arrays change nothing in the results except the order of additions.
    with_all = solve_with(stabilize_correctly, True, True, True, True)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(with_all), strict=True):
        assert testing.relative_error(x, y, 1e-30) < 1e-6  # Some gradients are zero.
