"""A sequence in chunks: how it is cut, what its gates mean there, and the states between chunks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.precision import product_precision
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import documents, rev_cumsum_off
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    LARGEST_GATE,
    MLSTMState,
)

# Input gate of padding: below every other, and finite so that no difference of two is a NaN.
_PADDING_GATE = -10 * LARGEST_GATE


def cut(x: jax.Array, leading: int, chunk_size: int | None, padding=0) -> jax.Array:
    """Cuts the axis of time into chunks, and folds the axes before it.

    Args:
        x: `(..., T, *rest)`.
        leading: Number of axes before `T`; their sizes make up `N`.
        chunk_size: Tokens in a chunk; None for one chunk.
        padding: What fills the last chunk up.

    Returns:
        `(N, NC, L, *rest)`, where `L` is the chunk's size, or `T` if that is less.
    """
    time, *rest = x.shape[leading:]
    size = time if chunk_size is None else min(chunk_size, time)
    x = x.reshape(math.prod(x.shape[:leading]), time, *rest)
    if time % size:
        widths = [(0, 0), (0, -time % size)] + [(0, 0)] * len(rest)
        x = jnp.pad(x, widths, constant_values=padding)
    return x.reshape(x.shape[0], x.shape[1] // size, size, *rest)


def join(x: jax.Array, leading: tuple[int, ...], time: int) -> jax.Array:
    """Joins what `cut` has cut: `(N, NC, L, *rest)` to `(*leading, T, *rest)`."""
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :time]
    return x.reshape(*leading, *x.shape[1:])


def fold_state(state: MLSTMState) -> MLSTMState:
    """Folds the leading axes of a state, or of its gradient, to `N`."""
    n = math.prod(state.m.shape)
    return MLSTMState(*(x.reshape(n, *x.shape[state.m.ndim :]) for x in state))


def unfold_state(state: MLSTMState, leading: tuple[int, ...]) -> MLSTMState:
    """The inverse of `fold_state`."""
    return MLSTMState(*(x.reshape(*leading, *x.shape[1:]) for x in state))


class ChunkGates(NamedTuple):
    """What the gates of a sequence mean within its chunks; each array is `(N, NC, L)`.

    Attributes:
        i: Input gate pre-activations.
        log_f: Log forget gates.
        carry: Log weight with which the state before the chunk reaches the token.
        write: Log weight with which the token reaches the state after the chunk.
        floor: Log weight of the zero state after a reset, which bounds `m`; None without resets.
        document: Number of resets in the chunk up to the token; None without resets.
    """

    i: jax.Array
    log_f: jax.Array
    carry: jax.Array
    write: jax.Array
    floor: jax.Array | None
    document: jax.Array | None


def chunk_gates(
    i: jax.Array, log_f: jax.Array, reset: jax.Array | None, chunk_size: int | None
) -> ChunkGates:
    """Cuts the gates into chunks.

    Args:
        i: Input gate pre-activations `(..., T)`.
        log_f: Log forget gates `(..., T)`.
        reset: Where the state is dropped before the token, bool `(..., T)`, or None.
        chunk_size: Tokens in a chunk; None for one chunk.

    Returns:
        What they mean there.
    """
    leading = i.ndim - 1
    i = cut(i, leading, chunk_size, _PADDING_GATE)
    log_f = cut(log_f, leading, chunk_size)
    carry, write = jnp.cumsum(log_f, axis=-1), rev_cumsum_off(log_f) + i
    if reset is None:
        return ChunkGates(i, log_f, carry, write, None, None)
    reset = cut(reset, leading, chunk_size, padding=False)
    document, floor = documents(log_f, reset)
    carry = jnp.where(document == 0, carry, -jnp.inf)
    floor = jnp.where(document == 0, -jnp.inf, floor)
    write = jnp.where(document == document[..., -1:], write, -jnp.inf)
    return ChunkGates(i, log_f, carry, write, floor, document)


def log_scales(log_weights: jax.Array, gates: ChunkGates, before_m: jax.Array) -> jax.Array:
    """The log scale `m` of every token.

    Args:
        log_weights: Log weights of the pairs, see `gates.pair_log_weights`, `(N, NC, L, L)`.
        gates: The gates.
        before_m: Log scale before each chunk `(N, NC)`.

    Returns:
        `(N, NC, L)`.
    """
    m = jnp.maximum(jnp.max(log_weights, axis=-1), gates.carry + before_m[..., None])
    return m if gates.floor is None else jnp.maximum(m, gates.floor)


def chunk_states(
    k: jax.Array,
    v: jax.Array,
    gates: ChunkGates,
    state: MLSTMState,
    precision: lax.Precision | None,
) -> tuple[MLSTMState, MLSTMState]:
    """Hands the state from chunk to chunk.

    Args:
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        gates: The gates.
        state: State before the first chunk, leading axis `N`.
        precision: See `product`.

    Returns:
        The states before every chunk, with leading axes `(N, NC)`, and the last state.
    """
    local_m = jnp.max(gates.write, axis=-1)
    weighted_k = k * jnp.exp(gates.write - local_m[..., None])[..., None]
    local_n = jnp.sum(weighted_k, axis=-2)
    floor = None if gates.floor is None else gates.floor[..., -1]
    xs = (weighted_k.astype(v.dtype), v, local_n, local_m, gates.carry[..., -1], floor)

    def after(state, xs):
        k, v, local_n, local_m, carry, floor = xs
        log_carry = carry + state.m
        m = jnp.maximum(log_carry, local_m)
        m = m if floor is None else jnp.maximum(m, floor)
        keep, add = jnp.exp(log_carry - m), jnp.exp(local_m - m)
        local_C = product("nlk,nlv->nkv", k, v, precision=precision)
        C = keep[:, None, None] * state.C + add[:, None, None] * local_C
        n = keep[:, None] * state.n + add[:, None] * local_n
        return MLSTMState(C, n, m)

    return _hand_on(after, state, xs)


def chunk_state_gradients(
    q: jax.Array,
    d_numerator: jax.Array,
    local_n: jax.Array,
    keep: jax.Array,
    last: tuple,
    precision: lax.Precision | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Hands the state's gradient from chunk to chunk, backward.

    Args:
        q: Queries with the weight of the state before the chunk, `(N, NC, L, DHQK)`.
        d_numerator: Gradient of the outputs' numerator `(N, NC, L, DHV)`.
        local_n: Gradient of `n` before the chunk through its own outputs, `(N, NC, DHQK)`.
        keep: Share of the state that a chunk hands on, `(N, NC)`.
        last: Gradient of `C` and `n` of the last state.
        precision: See `product`.

    Returns:
        The gradients of `C` and `n` after every chunk, and of the initial ones.
    """

    def before(d_state, xs):
        q, d_numerator, local_n, keep = xs
        d_C, d_n = d_state
        local_C = product("nlk,nlv->nkv", q, d_numerator, precision=precision)
        return keep[:, None, None] * d_C + local_C, keep[:, None] * d_n + local_n

    return _hand_on(before, last, (q, d_numerator, local_n, keep), reverse=True)


def _hand_on(step, state, xs, reverse=False):
    """A scan over axis 1 of `xs` that collects, in axis 1, the states that its steps begin with.

    `lax.scan` has axis 0 for both, which would cost a transposed copy of all the states.

    Args:
        step: `step(state, xs of a chunk) -> state`.
        state: What the first step begins with, leading axis `N`.
        xs: Arrays with the leading axes `(N, NC)`.
        reverse: Whether to begin with the last chunk.

    Returns:
        The collected states, with leading axes `(N, NC)`, and the one after the last step.
    """
    num_chunks = jax.tree.leaves(xs)[0].shape[1]

    def body(carry, chunk):
        state, states = carry
        states = jax.tree.map(
            lambda all_states, x: lax.dynamic_update_index_in_dim(all_states, x, chunk, axis=1),
            states,
            state,
        )
        of_chunk = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, chunk, 1, False), xs)
        return (step(state, of_chunk), states), None

    states = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], num_chunks, *x.shape[1:])), state
    )
    (state, states), _ = lax.scan(body, (state, states), jnp.arange(num_chunks), reverse=reverse)
    return states, state


def product(spec: str, *operands: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """Einsum of operands in the compute type, accumulated in at least float32."""
    return jnp.einsum(
        spec,
        *operands,
        precision=product_precision(precision, *operands),
        preferred_element_type=jnp.promote_types(jnp.result_type(*operands), jnp.float32),
    )
