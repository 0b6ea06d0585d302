import functools

import jax
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    chunk_gates,
    chunk_states,
    chunk_states_by_decays,
    fold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments, prepare_inputs
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.residuals import split_tokens


@functools.partial(jax.jit, static_argnums=(0, 3))
def _states(function, arguments, reset, chunk_size):
    inputs = prepare_inputs(MLSTMArguments(*arguments))
    _, k, v = split_tokens(inputs, chunk_size)
    gates = chunk_gates(inputs.i, inputs.log_f, reset, chunk_size)
    return function(k, v, gates, fold_state(inputs.state), None)


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 65])
def test_states_by_decays_are_those_of_the_scan(chunk_size, with_reset):
    problem = testing.problem(65, with_reset=with_reset)
    reset = problem.reset if with_reset else None
    actual, expected = (
        _states(function, problem.arguments, reset, chunk_size)
        for function in (chunk_states_by_decays, chunk_states)
    )
    before, _ = actual
    first = fold_state(prepare_inputs(MLSTMArguments(*problem.arguments)).state)
    for x, y in zip(before, first, strict=True):
        np.testing.assert_array_equal(x[:, 0], y)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = (np.reshape(a, (len(testing.CASES), -1)) for a in (x, y))
        for name, of_case, expected_of_case in zip(testing.CASES, x, y, strict=True):
            assert testing.relative_error(of_case, expected_of_case, 1e-30) < 2e-6, name


def _loops(arguments, chunk_size):
    function = functools.partial(_states, chunk_states_by_decays, chunk_size=chunk_size)
    return str(jax.make_jaxpr(lambda x: function(x, None))(arguments)).count("scan[")


def test_more_chunks_than_a_product_is_worth_are_scanned():
    arguments = testing.random_arguments(0, (1,), 129)
    assert _loops(arguments, 1) == 1
    assert _loops(arguments, 2) == 0
