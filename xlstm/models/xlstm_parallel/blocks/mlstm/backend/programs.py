"""The states between the chunks in the XLA program of `fwbw`, whose form depends on the device.

CPUs scan over the chunks; on accelerators, a loop is slow.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    ChunkGates,
    chunk_state_gradients,
    chunk_state_gradients_by_decays,
    chunk_states,
    chunk_states_by_decays,
    fold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import current_device
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMState
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import denominator
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.sequence_parts import (
    gradients_of_part,
    states_of_part,
)


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


def states_between_chunks(
    k: jax.Array,
    v: jax.Array,
    gates: ChunkGates,
    initial: MLSTMState,
    is_zero: bool,
    precision: lax.Precision | None,
    context_axis: str | None,
) -> tuple[MLSTMState, MLSTMState, MLSTMState | None]:
    """Computes the states between the chunks.

    Args:
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        gates: Gates of the chunks.
        initial: State before the first token.
        is_zero: Whether it is zero.
        precision: See `product`.
        context_axis: See `fwbw.fwbw_forward`.

    Returns:
        The state before every chunk, leading axes `(N, NC)`, and the last state. With
        `context_axis`, the latter is that after this device's part of the sequences, and the state
        before the part follows, else None.
    """
    states = states_of(is_zero=is_zero or context_axis is not None)
    states, initial = functools.partial(states, precision=precision), fold_state(initial)
    if context_axis:
        return states_of_part(states, k, v, gates, initial, context_axis)
    return *states(k, v, gates, initial), None


def gradients_between_chunks(
    local: tuple[jax.Array, jax.Array, jax.Array],
    gates: ChunkGates,
    m: jax.Array,
    d_last: MLSTMState,
    has_d_last: bool,
    precision: lax.Precision | None,
    context_axis: str | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Computes the gradients of the states between the chunks.

    Args:
        local: Queries, weighted by the state before the chunk, `(N, NC, L, DHQK)`, the gradient of
            the numerator `(N, NC, L, DHV)`, and that of the normalizer `(N, NC, L, 1)`.
        gates: Gates of the chunks.
        m: Log scales of the states before the chunks and of the last one, `(N, NC + 1)`.
        d_last: Gradient of the last state.
        has_d_last: Whether it is not zero.
        precision: See `product`.
        context_axis: See `fwbw.fwbw_forward`.

    Returns:
        The gradients of `C` and `n` after every chunk, and of the initial `C` and `n`.
    """
    q, d_numerator, d_qn = local
    d_last = fold_state(d_last)[:2]
    arguments = q.astype(d_numerator.dtype), d_numerator, jnp.sum(q * d_qn, axis=-2), gates, m
    if context_axis:
        nothing = jax.tree.map(jnp.zeros_like, d_last)
        of_part = _state_gradients_of(is_zero=True)(*arguments, nothing, precision)
        return gradients_of_part(*of_part, gates, m, d_last, context_axis)
    return _state_gradients_of(is_zero=not has_d_last)(*arguments, d_last, precision)


def _state_gradients_of(is_zero: bool) -> Callable:
    """Returns `chunk_state_gradients`, or the function that does the same without a loop."""
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
