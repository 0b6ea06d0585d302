"""Tests that outputs and gradients are finite for all finite gates."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend

TIME, QK_DIM, V_DIM = 5, 2, 3
SEQUENCES = 8  # Sequences per example, since calls cost more than batches.
LARGEST = float(np.finfo(np.float32).max)
# Bounds and special cases of the code, in addition to the values that Hypothesis draws.
SPECIAL_GATES = [0.0, 1e-45, 40.0, 80.0, 88.7, 88.8, 104.0, 1e9, 1e20, 1e29, 1e30, LARGEST]
SPECIAL_VALUES = [0.0, 1e-45, 1e-38, 1e-20, 1e-10, 1.0, 1e4]


def _arrays(shape, largest, special):
    numbers = st.one_of(
        st.sampled_from([sign * x for x in special for sign in (1, -1)]),
        st.floats(-100, 100, width=32),
        st.floats(-largest, largest, width=32),
    )
    return hnp.arrays(np.float32, shape, elements=numbers)


def _values(*shape):
    return _arrays((SEQUENCES, *shape), 1e4, SPECIAL_VALUES)


def _gates():
    return _arrays((SEQUENCES, TIME), LARGEST, SPECIAL_GATES)


@functools.cache
def _cell(name, chunk_size, stabilize_correctly):
    """Returns the function, compiled once."""
    backend = create_backend(BackendConfig(name, chunk_size, stabilize_correctly))

    def run(first, second, cotangents):
        def both(first, second):
            # The last state of a sequence is as extreme as its gates.
            h1, state = backend.apply({}, *first, return_last_states=True)
            h2, state = backend.apply({}, *second, *state, return_last_states=True)
            return h1, h2, tuple(state)

        outputs, vjp = jax.vjp(both, first, second)
        return outputs, vjp(cotangents)

    return jax.jit(run)


TOKENS = st.tuples(
    _values(TIME, QK_DIM), _values(TIME, QK_DIM), _values(TIME, V_DIM), _gates(), _gates()
)


def _uniform(value, igate, fgate):
    """Returns identical tokens."""
    full = functools.partial(np.full, dtype=np.float32)
    shape = (SEQUENCES, TIME)
    return (
        full((*shape, QK_DIM), value),
        full((*shape, QK_DIM), value),
        full((*shape, V_DIM), value),
        full(shape, igate),
        full(shape, fgate),
    )


@pytest.mark.parametrize("stabilize_correctly", [False, True])
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("fwbw", 0), ("fwbw", 2), ("parallel_stabilized", 0), ("recurrent", 0)],
)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@example(_uniform(1e4, LARGEST, -LARGEST), _uniform(1e4, -LARGEST, LARGEST), 0)
@example(_uniform(1e4, -LARGEST, -LARGEST), _uniform(1e4, -LARGEST, -LARGEST), 0)
@example(_uniform(1e4, 80.0, 40.0), _uniform(1e-20, -80.0, -40.0), 0)
@example(_uniform(0.0, 0.0, 0.0), _uniform(0.0, LARGEST, LARGEST), 0)
@given(TOKENS, TOKENS, st.integers(0, 2**16))
def test_outputs_states_and_gradients_are_finite(
    name, chunk_size, stabilize_correctly, first, second, seed
):
    rng = np.random.default_rng(seed)
    shapes = [(TIME, V_DIM), (TIME, V_DIM), ((QK_DIM, V_DIM), (QK_DIM,), ())]
    cotangents = jax.tree.map(
        lambda shape: np.float32(rng.uniform(-1, 1, (SEQUENCES, *shape))),
        tuple(shapes),
        is_leaf=lambda x: all(isinstance(size, int) for size in x),
    )
    outputs, grads = _cell(name, chunk_size, stabilize_correctly)(first, second, cotangents)
    names = ["h1", "h2", "C", "n", "m", *(f"d{x}{at}" for at in (1, 2) for x in "qkvif")]
    for key, x in zip(names, jax.tree.leaves((outputs, grads)), strict=True):
        assert np.all(np.isfinite(x)), f"{key} is not finite"
