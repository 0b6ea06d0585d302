"""Tests of the XLA program on sequences in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)

CHUNK_SIZE = 5


@functools.cache
def cell_of(num_parts, chunk_size=CHUNK_SIZE, stabilize_correctly=True, keeps=True):
    """Returns the function of whole sequences; one part is the program without parts."""
    options = dict.fromkeys(("keep_G", "keep_gates", "keep_M", "keep_c"), keeps)
    config = mLSTMBackendFwbwConfig(
        chunk_size, return_state=True, stabilize_correctly=stabilize_correctly, **options
    )
    function = mlstm_fwbw_custom_grad

    def cell(arguments, reset):
        axis = None if num_parts == 1 else "cp"
        h, state = function(config, None, axis)(*arguments, reset=reset)
        return h, tuple(state)

    return cell if num_parts == 1 else testing.in_parts(cell, num_parts)


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize(
    ("num_parts", "time", "stabilize_correctly", "keeps"),
    [(2, 64, True, False), (4, 64, False, True), (8, 64, True, True), (8, 8, True, False)],
)
def test_outputs_states_and_gradients(num_parts, time, stabilize_correctly, keeps, with_reset):
    problem = testing.problem(
        time, with_reset=with_reset, stabilize_correctly=stabilize_correctly
    )
    cell = cell_of(num_parts, CHUNK_SIZE, stabilize_correctly, keeps)
    actual = testing.outputs_and_gradients(
        cell, problem.arguments, problem.reset if with_reset else None, problem.cotangents
    )
    testing.assert_solves(problem, *actual)
