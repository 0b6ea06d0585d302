"""Sequences in chunks: their split, their gates, and the states between the chunks.

`N` is the product of the leading axes, such as batch and heads; `xlstm.common_types` describes the
other sizes.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.precision import product_precision
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    documents,
    pair_log_weights,
    rev_cumsum_off,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    LARGEST_GATE,
    MLSTMState,
)

# Input gate of padding: below every other gate, and finite, so that differences are never NaN.
PADDING_GATE = -10 * LARGEST_GATE
# The work of the product with the decays grows with the square of the number of chunks. With this
# many chunks of 64 tokens it still pays: 9.1 instead of 14.7 ms forward, counted for an H100.
_MOST_CHUNKS_BY_DECAYS = 128


def split_chunks(x: jax.Array, leading: int, chunk_size: int | None, padding=0) -> jax.Array:
    """Splits the time axis into chunks, and folds the axes before it.

    Args:
        x: Array `(..., T, *rest)`.
        leading: Number of axes before `T`; the product of their sizes is `N`.
        chunk_size: Number of tokens in a chunk; None for one chunk.
        padding: Value that fills the last chunk.

    Returns:
        An array `(N, NC, L, *rest)`, where `L` is the chunk size, or `T` if that is smaller.
    """
    time, *rest = x.shape[leading:]
    size = time if chunk_size is None else min(chunk_size, time)
    x = x.reshape(math.prod(x.shape[:leading]), time, *rest)
    if time % size:
        widths = [(0, 0), (0, -time % size)] + [(0, 0)] * len(rest)
        x = jnp.pad(x, widths, constant_values=padding)
    return x.reshape(x.shape[0], x.shape[1] // size, size, *rest)


def merge_chunks(x: jax.Array, leading: tuple[int, ...], time: int) -> jax.Array:
    """Inverts `split_chunks`: `(N, NC, L, *rest)` to `(*leading, T, *rest)`."""
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :time]
    return x.reshape(*leading, *x.shape[1:])


def fold_state(state: MLSTMState) -> MLSTMState:
    """Folds the leading axes of a state, or of its gradient, into `N`."""
    n = math.prod(state.m.shape)
    return MLSTMState(*(x.reshape(n, *x.shape[state.m.ndim :]) for x in state))


def unfold_state(state: MLSTMState, leading: tuple[int, ...]) -> MLSTMState:
    """Inverts `fold_state`."""
    return MLSTMState(*(x.reshape(*leading, *x.shape[1:]) for x in state))


class ChunkGates(NamedTuple):
    """Gates of a sequence in chunks, and their sums within each chunk; arrays `(N, NC, L)`.

    Attributes:
        i: Input gate pre-activations.
        log_f: Log forget gates.
        carry: Log weight of the state before the chunk at the token.
        write: Log weight of the token in the state after the chunk.
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
    """Splits the gates into chunks and sums them.

    Args:
        i: Input gate pre-activations `(..., T)`.
        log_f: Log forget gates `(..., T)`.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        chunk_size: Number of tokens in a chunk; None for one chunk.

    Returns:
        The gates and their sums.
    """
    leading = i.ndim - 1
    i = split_chunks(i, leading, chunk_size, PADDING_GATE)
    log_f = split_chunks(log_f, leading, chunk_size)
    carry, write = jnp.cumsum(log_f, axis=-1), rev_cumsum_off(log_f) + i
    if reset is None:
        return ChunkGates(i, log_f, carry, write, None, None)
    reset = split_chunks(reset, leading, chunk_size, padding=False)
    document, floor = documents(log_f, reset)
    carry = jnp.where(document == 0, carry, -jnp.inf)
    floor = jnp.where(document == 0, -jnp.inf, floor)
    write = jnp.where(document == document[..., -1:], write, -jnp.inf)
    return ChunkGates(i, log_f, carry, write, floor, document)


def log_scales(log_weights: jax.Array, gates: ChunkGates, before_m: jax.Array) -> jax.Array:
    """Returns the log scale `m` of every token.

    Args:
        log_weights: Log weights of the pairs `(N, NC, L, L)`, see `gates.pair_log_weights`.
        gates: Gates of the chunks.
        before_m: Log scale before each chunk `(N, NC)`.

    Returns:
        The log scales `(N, NC, L)`.
    """
    m = jnp.maximum(jnp.max(log_weights, axis=-1), gates.carry + before_m[..., None])
    return m if gates.floor is None else jnp.maximum(m, gates.floor)


class _ChunkSums(NamedTuple):
    """What the chunks alone add to the state after them; leading axes `(N, NC)`.

    Attributes:
        k: Keys `(N, NC, L, DHQK)`, weighted by the token in the state after the chunk.
        n: Sum of the weighted keys `(N, NC, DHQK)`.
        m: Log scale of the weights `(N, NC)`.
        carry: Log weight of the state before the chunk in the state after it; -inf after a reset.
        floor: Log weight of the zero state after a reset; None without resets.
    """

    k: jax.Array
    n: jax.Array
    m: jax.Array
    carry: jax.Array
    floor: jax.Array | None


def _chunk_sums(k: jax.Array, gates: ChunkGates) -> _ChunkSums:
    """Weights the keys `(N, NC, L, DHQK)` of each chunk and adds them up."""
    m = jnp.max(gates.write, axis=-1)
    k = k * jnp.exp(gates.write - m[..., None])[..., None]
    floor = None if gates.floor is None else gates.floor[..., -1]
    return _ChunkSums(k, jnp.sum(k, axis=-2), m, gates.carry[..., -1], floor)


def _state_after(
    state: MLSTMState, chunk: _ChunkSums, v: jax.Array, precision: lax.Precision | None
) -> MLSTMState:
    """Returns the state after a chunk: `state`, `chunk` and `v (N, L, DHV)` have no axis `NC`."""
    log_carry = chunk.carry + state.m
    m = jnp.maximum(log_carry, chunk.m)
    m = m if chunk.floor is None else jnp.maximum(m, chunk.floor)
    keep, add = jnp.exp(log_carry - m), jnp.exp(chunk.m - m)
    chunk_C = product("nlk,nlv->nkv", chunk.k.astype(v.dtype), v, precision=precision)
    C = keep[:, None, None] * state.C + add[:, None, None] * chunk_C
    n = keep[:, None] * state.n + add[:, None] * chunk.n
    return MLSTMState(C, n, m)


def chunk_states(
    k: jax.Array,
    v: jax.Array,
    gates: ChunkGates,
    state: MLSTMState,
    precision: lax.Precision | None,
) -> tuple[MLSTMState, MLSTMState]:
    """Computes the states between the chunks, one after the other.

    Args:
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        gates: Gates of the chunks.
        state: State before the first chunk, leading axis `N`.
        precision: See `product`.

    Returns:
        The state before every chunk, leading axes `(N, NC)`, and the last state.
    """
    sums = _chunk_sums(k, gates)
    xs = sums._replace(k=sums.k.astype(v.dtype)), v
    return _scan_chunks(lambda state, xs: _state_after(state, *xs, precision), state, xs)


def chunk_states_by_decays(
    k: jax.Array,
    v: jax.Array,
    gates: ChunkGates,
    state: MLSTMState,
    precision: lax.Precision | None,
    is_zero: bool = False,
) -> tuple[MLSTMState, MLSTMState]:
    """Computes what `chunk_states` does without a loop, for devices on which a loop is slow.

    The states are one product of the chunks' own sums with the decays from chunk to chunk. Its work
    is `NC / L` times that of the sums, so with many chunks this is `chunk_states`.

    Args:
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        gates: Gates of the chunks.
        state: State before the first chunk, leading axis `N`.
        precision: See `product`.
        is_zero: Whether `C` and `n` of `state` are zero, which saves adding them.

    Returns:
        The state before every chunk, leading axes `(N, NC)`, with `C` in the type of `v`, and the
        last state.
    """
    if k.shape[1] > _MOST_CHUNKS_BY_DECAYS:
        return chunk_states(k, v, gates, state, precision)
    log_decays = _log_decays(gates)
    bound = jnp.max(gates.write, axis=-1)
    if gates.floor is not None:
        bound = jnp.maximum(bound, gates.floor[..., -1])
    bound = jnp.concatenate([state.m[:, None], bound], axis=1)
    m = jnp.max(log_decays + bound[:, None, :], axis=-1)
    decays = _decays(log_decays, m)
    of_initial, of_chunks = decays[..., 0], decays[..., 1:]

    k = k * jnp.exp(gates.write - m[:, 1:, None])[..., None]
    sums = product("nclk,nclv->nckv", k.astype(v.dtype), v, precision=precision)
    sums = round_to(sums, v.dtype)
    multiply = functools.partial(product, precision=precision)
    C = multiply("ntc,nckv->ntkv", of_chunks[:, :-1].astype(v.dtype), sums)
    last_C = multiply("nc,nckv->nkv", of_chunks[:, -1].astype(v.dtype), sums)
    n = product("ntc,nck->ntk", of_chunks, jnp.sum(k, axis=-2), precision=lax.Precision.HIGHEST)
    if not is_zero:
        C += of_initial[:, :-1, None, None] * state.C[:, None]
        last_C += of_initial[:, -1, None, None] * state.C
        n += of_initial[..., None] * state.n[:, None]
    before = MLSTMState(round_to(C, v.dtype), n[:, :-1], m[:, :-1])
    return before, MLSTMState(last_C, n[:, -1], m[:, -1])


def _log_decays(gates: ChunkGates) -> jax.Array:
    """Returns the log weight of each state between chunks in each later one, `(N, NC + 1, NC + 1)`.

    Entry `[t, s]` is for the states before chunks `t` and `s`, where `NC` is the last state.
    """
    carry = gates.carry[..., -1]
    has_reset = carry == -jnp.inf
    shift = functools.partial(jnp.pad, pad_width=[(0, 0), (1, 0)])
    log_f = shift(jnp.where(has_reset, 0, carry))
    document = jnp.cumsum(shift(has_reset), axis=1)
    return pair_log_weights(jnp.zeros_like(log_f), log_f, document)


def _decays(log_decays: jax.Array, m: jax.Array) -> jax.Array:
    """Returns the weights of `_log_decays` in states that are divided by `exp(m)`."""
    return exp_decay(log_decays + m[:, None, :] - m[:, :, None])


def state_keep(gates: ChunkGates, m: jax.Array) -> jax.Array:
    """Returns the factor of the state before a chunk in the state after it.

    Args:
        gates: Gates of the chunks.
        m: Log scales of the states before the chunks and of the last one, `(N, NC + 1)`.

    Returns:
        The factors `(N, NC)`.
    """
    return exp_decay(gates.carry[..., -1] + m[:, :-1] - m[:, 1:])


def exp_decay(log_decay: jax.Array) -> jax.Array:
    """Returns `exp(log_decay)`, at most 1: rounding can bring sums of huge gates above 0."""
    return jnp.exp(jnp.minimum(log_decay, 0))


def chunk_state_gradients(
    q: jax.Array,
    d_numerator: jax.Array,
    local_n: jax.Array,
    gates: ChunkGates,
    m: jax.Array,
    last: tuple[jax.Array, jax.Array],
    precision: lax.Precision | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Computes the gradients of the states between the chunks, one after the other.

    Args:
        q: Queries, weighted by the state before the chunk, `(N, NC, L, DHQK)`.
        d_numerator: Gradient of the numerator of the outputs `(N, NC, L, DHV)`.
        local_n: Gradient of `n` before the chunk through the chunk's outputs, `(N, NC, DHQK)`.
        gates: Gates of the chunks.
        m: Log scales of the states before the chunks and of the last one, `(N, NC + 1)`.
        last: Gradient of `C` and `n` of the last state.
        precision: See `product`.

    Returns:
        The gradients of `C` and `n` after every chunk, and of the initial `C` and `n`.
    """

    def before(d_state, xs):
        q, d_numerator, local_n, keep = xs
        d_C, d_n = d_state
        local_C = product("nlk,nlv->nkv", q, d_numerator, precision=precision)
        return keep[:, None, None] * d_C + local_C, keep[:, None] * d_n + local_n

    xs = q, d_numerator, local_n, state_keep(gates, m)
    return _scan_chunks(before, last, xs, reverse=True)


def chunk_state_gradients_by_decays(
    q: jax.Array,
    d_numerator: jax.Array,
    local_n: jax.Array,
    gates: ChunkGates,
    m: jax.Array,
    last: tuple[jax.Array, jax.Array],
    precision: lax.Precision | None,
    is_zero: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Computes what `chunk_state_gradients` does without a loop, as `chunk_states_by_decays`.

    Args:
        q: Queries, weighted by the state before the chunk, `(N, NC, L, DHQK)`.
        d_numerator: Gradient of the numerator of the outputs `(N, NC, L, DHV)`.
        local_n: Gradient of `n` before the chunk through the chunk's outputs, `(N, NC, DHQK)`.
        gates: Gates of the chunks.
        m: Log scales of the states before the chunks and of the last one, `(N, NC + 1)`.
        last: Gradient of `C` and `n` of the last state.
        precision: See `product`.
        is_zero: Whether `last` is zero, which saves adding it.

    Returns:
        The gradients of `C`, in the type of `q`, and `n` after every chunk, and of the initial `C`
        and `n`.
    """
    if q.shape[1] > _MOST_CHUNKS_BY_DECAYS:
        return chunk_state_gradients(q, d_numerator, local_n, gates, m, last, precision)
    decays = _decays(_log_decays(gates), m)
    to_last, decays = decays[:, -1], decays[:, :-1]
    sums = product("nctk,nctv->nckv", q, d_numerator, precision=precision)
    sums = round_to(sums, q.dtype)
    multiply = functools.partial(product, precision=precision)
    d_C = multiply("ntc,ntkv->nckv", decays[..., 1:].astype(q.dtype), sums)
    if not is_zero:
        d_C += to_last[:, 1:, None, None] * last[0][:, None]
    initial_C = multiply("nt,ntkv->nkv", decays[..., 0].astype(q.dtype), sums)
    initial_C += to_last[:, 0, None, None] * last[0]
    d_n = product("ntc,ntk->nck", decays, local_n, precision=lax.Precision.HIGHEST)
    d_n += to_last[..., None] * last[1][:, None]
    return (round_to(d_C, q.dtype), d_n[:, 1:]), (initial_C, d_n[:, 0])


def _scan_chunks(step, state, xs, reverse=False):
    """Scans over axis 1 of `xs`, and stacks the states before each step on axis 1.

    `lax.scan` uses axis 0 for both, which would cost a transposed copy of all states.

    Args:
        step: Function `step(state, xs of a chunk) -> state`.
        state: State before the first step, leading axis `N`.
        xs: Arrays with the leading axes `(N, NC)`.
        reverse: Whether to start with the last chunk.

    Returns:
        The states before each step, leading axes `(N, NC)`, and the state after the last step.
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


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds an array to be stored in a type; XLA may keep a wider copy of a mere conversion."""
    return x if x.dtype == dtype else lax.optimization_barrier(x.astype(dtype))


def product(spec: str, *operands: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """Computes an einsum of operands in the compute type, accumulated in at least float32."""
    return jnp.einsum(
        spec,
        *operands,
        precision=product_precision(precision, *operands),
        preferred_element_type=jnp.promote_types(jnp.result_type(*operands), jnp.float32),
    )
