"""Where the XLA program of `fwbw` for accelerators differs from that for CPUs."""

import functools
from collections.abc import Callable

import jax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    chunk_state_gradients,
    chunk_state_gradients_by_decays,
    chunk_states,
    chunk_states_by_decays,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import current_device
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMState
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import denominator


def is_cpu() -> bool:
    """Returns whether the program is compiled for a CPU."""
    return current_device().platform == "cpu"


def states_of(is_zero: bool) -> Callable[..., tuple[MLSTMState, MLSTMState]]:
    """Returns `chunk_states`, or the function that does the same without a loop.

    Args:
        is_zero: Whether the state before the first chunk is zero.
    """
    if is_cpu():
        return chunk_states
    return functools.partial(chunk_states_by_decays, is_zero=is_zero)


def state_gradients_of(is_zero: bool) -> Callable:
    """Returns `chunk_state_gradients`, or the function that does the same without a loop.

    Args:
        is_zero: Whether the gradient of the state after the last chunk is zero.
    """
    if is_cpu():
        return chunk_state_gradients
    return functools.partial(chunk_state_gradients_by_decays, is_zero=is_zero)


def split_denominator(
    qn: jax.Array, m: jax.Array, stabilize_correctly: bool
) -> tuple[jax.Array | float, jax.Array | float]:
    """Splits the denominator into the divisors of the factors and of the output.

    On accelerators, XLA stores a sum of products in the type of the output only if no division
    follows. On a CPU, it computes the products and the division in one go.

    Args:
        qn: `n_t . q_t`, `(N, NC, L)`.
        m: Log scale of every token `(N, NC, L)`.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        The two divisors; one is the denominator `(N, NC, L, 1)`, and the other is 1.
    """
    divisor = denominator(qn, m, stabilize_correctly)[..., None]
    return (1.0, divisor) if is_cpu() else (divisor, 1.0)
