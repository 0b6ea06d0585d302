"""The mLSTM in its chunkwise form, with a hand-written backward pass.

The sequence is cut into `NC` chunks of `L` tokens. Inside of a chunk every pair of tokens is
weighed as in the parallel form; between chunks the state `(C, n, m)` is handed on as in the
recurrent form. The work is linear in `T`, and nothing of size `T x T` exists.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    MLSTMInputs,
    MLSTMState,
    divide_by_normalizer,
    mLSTMBackend,
    mLSTMBackendConfig,
    prepare_inputs,
)

# Input gate of padding: neutral, and finite so that no difference of two of them is a NaN.
_PADDING_GATE = -1e30


@dataclasses.dataclass(frozen=True)
class mLSTMBackendFwbwConfig(mLSTMBackendConfig):
    """Options of the `fwbw` backend."""

    chunk_size: int | None = 512  # Tokens in a chunk, L; None for one chunk.
    return_state: bool = False  # Whether the function returns the last state too.
    stabilize_correctly: bool = False  # Bound the normalizer by exp(-m) instead of 1.

    def __post_init__(self):
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: it must be at least 1, or None")


def rev_cumsum(x: jax.Array) -> jax.Array:
    """Inclusive reverse cumulative sum over the last axis: entry `r` is the sum over `t >= r`."""
    return lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def rev_cumsum_off(x: jax.Array) -> jax.Array:
    """Exclusive reverse cumulative sum over the last axis: entry `r` is the sum over `t > r`."""
    # Shifted, not `rev_cumsum(x) - x`, which would lose what is small beside `x`.
    return jnp.pad(rev_cumsum(x[..., 1:]), [(0, 0)] * (x.ndim - 1) + [(0, 1)])


class _Chunks(NamedTuple):
    """A sequence cut into chunks, with the log weights that the gates give.

    Attributes:
        q: Queries `(N, NC, L, DHQK)`.
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        pair: Log weight with which token `s` reaches token `t`, `(N, NC, L, L)`; -inf if not.
        carry: Log weight with which the state before the chunk reaches token `t`, `(N, NC, L)`.
        floor: Log weight of the zero state after a reset, which bounds `m_t`, `(N, NC, L)`.
        write: Log weight with which token `s` reaches the state after the chunk, `(N, NC, L)`.
        reset: Where the state is dropped, `(N, NC, L)`, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pair: jax.Array
    carry: jax.Array
    floor: jax.Array
    write: jax.Array
    reset: jax.Array | None


def _cut(x: jax.Array, leading: int, chunk: int, padding=0) -> jax.Array:
    """Cuts `(..., T, *rest)`, with `leading` axes before `T`, into `(N, NC, L, *rest)`."""
    x = x.reshape(-1, *x.shape[leading:])
    missing = -x.shape[1] % chunk
    if missing:
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=padding)
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_cut`: joins `(N, NC, L, *rest)` to the shape and type of `like`."""
    leading = like.ndim - (x.ndim - 2)
    time = like.shape[leading]
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
    return x.reshape(like.shape).astype(like.dtype)


def _cut_inputs(inputs: MLSTMInputs, chunk_size: int | None) -> _Chunks:
    q, k, v, i, log_f, reset, _ = inputs
    leading, time = i.ndim - 1, i.shape[-1]
    chunk = time if chunk_size is None else min(chunk_size, time)
    q, k, v, log_f = (_cut(x, leading, chunk) for x in (q, k, v, log_f))
    i = _cut(i, leading, chunk, padding=_PADDING_GATE)
    b = jnp.cumsum(log_f, axis=-1)
    reaches = jnp.tril(jnp.ones((chunk, chunk), bool))
    carry, floor, write = b, jnp.full_like(b, -jnp.inf), b[..., -1:] - b + i
    if reset is not None:
        reset = _cut(reset, leading, chunk)
        document = jnp.cumsum(reset, axis=-1)
        reaches = reaches & (document[..., :, None] == document[..., None, :])
        start = lax.cummax(jnp.where(reset, jnp.arange(chunk), 0), axis=2)
        before_start = jnp.take_along_axis(b - log_f, start, axis=-1)
        floor = jnp.where(document == 0, -jnp.inf, b - before_start)
        carry = jnp.where(document == 0, b, -jnp.inf)
        write = jnp.where(document == document[..., -1:], write, -jnp.inf)
    pair = b[..., :, None] - b[..., None, :] + i[..., None, :]
    pair = jnp.where(reaches, pair, -jnp.inf)
    return _Chunks(q, k, v, pair, carry, floor, write, reset)


def _scan_states(chunks: _Chunks, state: MLSTMState) -> tuple[MLSTMState, MLSTMState]:
    """Hands the state from chunk to chunk.

    Args:
        chunks: The cut sequence.
        state: State before the first chunk, leading axis `N`.

    Returns:
        The states before every chunk, with leading axes `(N, NC)`, and the last state.
    """
    local_m = jnp.max(chunks.write, axis=-1)
    weighted_k = chunks.k * jnp.exp(chunks.write - local_m[..., None])[..., None]
    local_C = _product("nclk,nclv->nckv", weighted_k.astype(chunks.v.dtype), chunks.v)
    local_n = jnp.sum(weighted_k, axis=2)
    chunk_carry, chunk_floor = chunks.carry[..., -1], chunks.floor[..., -1]

    def body(state, xs):
        local, carry, floor = xs
        log_carry = carry + state.m
        m = jnp.maximum(jnp.maximum(log_carry, floor), local.m)
        keep, add = jnp.exp(log_carry - m), jnp.exp(local.m - m)
        new = MLSTMState(
            C=keep[:, None, None] * state.C + add[:, None, None] * local.C,
            n=keep[:, None] * state.n + add[:, None] * local.n,
            m=m,
        )
        return new, state

    xs = (MLSTMState(local_C, local_n, local_m), chunk_carry, chunk_floor)
    last, before = lax.scan(body, state, jax.tree.map(lambda x: x.swapaxes(0, 1), xs))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), before), last


def _product(spec: str, *operands: jax.Array) -> jax.Array:
    """Einsum of operands in the compute type, accumulated in at least float32."""
    dtype = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    return jnp.einsum(spec, *operands, preferred_element_type=dtype)


class _Outputs(NamedTuple):
    """What the forward pass of all chunks computes on the way to `h`."""

    h: jax.Array  # (N, NC, L, DHV)
    qn: jax.Array  # n_t . q_t, (N, NC, L)
    m: jax.Array  # (N, NC, L)


def _outputs(chunks: _Chunks, before: MLSTMState, stabilize_correctly: bool) -> _Outputs:
    q, k, v = chunks.q, chunks.k, chunks.v
    log_carry = chunks.carry + before.m[..., None]
    m = jnp.maximum(jnp.max(chunks.pair, axis=-1), jnp.maximum(log_carry, chunks.floor))
    scores = _product("nctk,ncsk->ncts", q, k) * jnp.exp(chunks.pair - m[..., None])
    carried_q = q * jnp.exp(log_carry - m)[..., None]
    numerator = _product("ncts,ncsv->nctv", scores.astype(v.dtype), v)
    numerator += _product("nctk,nckv->nctv", carried_q.astype(q.dtype), before.C.astype(q.dtype))
    qn = jnp.sum(scores, axis=-1) + jnp.sum(carried_q * before.n[..., None, :], axis=-1)
    return _Outputs(divide_by_normalizer(numerator, qn, m, stabilize_correctly), qn, m)


def _fold_state(state: MLSTMState) -> MLSTMState:
    """Folds the leading axes of a state to one, `N`."""
    qk_dim, v_dim = state.C.shape[-2:]
    return MLSTMState(
        state.C.reshape(-1, qk_dim, v_dim), state.n.reshape(-1, qk_dim), state.m.reshape(-1)
    )


def _forward(inputs: MLSTMInputs, config: mLSTMBackendFwbwConfig):
    chunks = _cut_inputs(inputs, config.chunk_size)
    before, last = _scan_states(chunks, _fold_state(inputs.state))
    outputs = _outputs(chunks, before, config.stabilize_correctly)
    h = _join(outputs.h, inputs.v)
    last = jax.tree.map(lambda x, like: x.reshape(like.shape), last, inputs.state)
    return (h, last), (inputs, before, last, outputs)


def _dot(a: MLSTMState, b: MLSTMState) -> jax.Array:
    """`<C_a, C_b> + <n_a, n_b>` of two states, over all but the leading axes."""
    return jnp.sum(a.C * b.C, axis=(-2, -1)) + jnp.sum(a.n * b.n, axis=-1)


def _gradients_of_output(dh: jax.Array, outputs: _Outputs, stabilize_correctly: bool):
    """Gradients of the numerator `(N, NC, L, DHV)` and of `qn (N, NC, L)`."""
    h, qn, m = outputs
    bound = jnp.exp(-m) if stabilize_correctly else jnp.ones_like(m)
    denominator = jnp.maximum(jnp.abs(qn), bound)
    d_numerator = dh / denominator[..., None]
    if not stabilize_correctly:  # The denominator is a constant.
        return d_numerator, jnp.zeros_like(qn)
    d_qn = -jnp.sign(qn) * jnp.sum(dh * h, axis=-1) / denominator
    return d_numerator, jnp.where(jnp.abs(qn) > bound, d_qn, 0)


def _gradient_of_last_m(inputs: MLSTMInputs, d_m: jax.Array):
    """Follows the maxima of `m` from the last state back to the gates.

    Args:
        inputs: The sequence.
        d_m: Gradient of the last `m`, all other ways for it accounted for, `(...)`.

    Returns:
        Gradients of `i (..., T)`, of `log_f (..., T)` and of the initial `m (...)`.
    """
    time = inputs.i.shape[-1]
    to_end = rev_cumsum_off(inputs.log_f)  # Log forget gates after the token.
    start = jnp.zeros(d_m.shape, int)
    is_carried = jnp.ones(d_m.shape, bool)
    if inputs.reset is not None:
        start = jnp.max(jnp.where(inputs.reset, jnp.arange(time), 0), axis=-1)
        is_carried = ~jnp.any(inputs.reset, axis=-1)
    in_document = jnp.arange(time) >= start[..., None]
    token = jnp.where(in_document, inputs.i + to_end, -jnp.inf)
    first = jnp.take_along_axis(to_end + inputs.log_f, start[..., None], axis=-1)[..., 0]
    carry = first + jnp.where(is_carried, inputs.state.m, 0)
    from_token = jnp.max(token, axis=-1) >= carry
    source = jnp.where(from_token, jnp.argmax(token, axis=-1), start - 1)
    d_i = jnp.where(from_token[..., None] & (jnp.arange(time) == source[..., None]), 1, 0)
    d_log_f = jnp.where(jnp.arange(time) > source[..., None], 1, 0)
    d_m0 = jnp.where(~from_token & is_carried, d_m, 0)
    return d_i * d_m[..., None], d_log_f * d_m[..., None], d_m0


def _sum_of_spanning_pairs(pairs: jax.Array) -> jax.Array:
    """For every token `r` the sum over the pairs `t >= r > s`.

    Args:
        pairs: `(..., L, L)`, entry `[t, s]`.

    Returns:
        `(..., L)`.
    """
    ones = jnp.ones(pairs.shape[-2:], pairs.dtype)
    reached = jnp.einsum("...ts,sr->...tr", pairs, jnp.triu(ones, 1), precision="highest")
    return jnp.sum(jnp.where(jnp.tril(ones) > 0, reached, 0), axis=-2)


def _scan_state_gradients(d_local: MLSTMState, keep: jax.Array, d_last: MLSTMState):
    """Hands the state's gradient from chunk to chunk, backward.

    Args:
        d_local: Gradient of the state before every chunk through its own outputs; `m` unused.
        keep: Share of the state that a chunk hands on, `(N, NC)`.
        d_last: Gradient of the last state; `m` unused.

    Returns:
        The gradients of the states after every chunk, and of the initial state.
    """

    def body(d_after, xs):
        d_C, d_n, keep = xs
        C, n = d_after
        return (keep[:, None, None] * C + d_C, keep[:, None] * n + d_n), d_after

    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), (d_local.C, d_local.n, keep))
    d_initial, d_after = lax.scan(body, (d_last.C, d_last.n), xs, reverse=True)
    d_after = jax.tree.map(lambda x: x.swapaxes(0, 1), d_after)
    return MLSTMState(*d_after, m=None), MLSTMState(*d_initial, m=None)


def _backward(config: mLSTMBackendFwbwConfig, residuals, cotangents):
    """Gradient of `_forward`: exact, with what is cheap computed again rather than kept."""
    inputs, before, last, outputs = residuals
    dh, d_last = cotangents
    chunks = _cut_inputs(inputs, config.chunk_size)
    q, k, v = chunks.q, chunks.k, chunks.v
    dtype = q.dtype
    dh = _cut(dh, inputs.i.ndim - 1, q.shape[2]).astype(outputs.h.dtype)
    d_numerator, d_qn = _gradients_of_output(dh, outputs, config.stabilize_correctly)
    d_numerator = d_numerator.astype(dtype)

    # Weights of the state before the chunk, of the tokens in the state after it, and what it keeps.
    log_carry = chunks.carry + before.m[..., None]
    carry = jnp.exp(log_carry - outputs.m)[..., None]
    last_m = last.m.reshape(-1)
    after_m = jnp.concatenate([before.m[:, 1:], last_m[:, None]], axis=1)
    write = jnp.exp(chunks.write - after_m[..., None])[..., None]
    keep = jnp.exp(log_carry[..., -1] - after_m)

    carried_q = q * carry
    d_local = MLSTMState(
        C=_product("nctk,nctv->nckv", carried_q.astype(dtype), d_numerator),
        n=jnp.sum(carried_q * d_qn[..., None], axis=2),
        m=None,
    )
    d_after, d_initial = _scan_state_gradients(d_local, keep, _fold_state(d_last))

    # Through the states.
    dq_carry = carry * (
        _product("nctv,nckv->nctk", d_numerator, before.C.astype(dtype))
        + d_qn[..., None] * before.n[..., None, :]
    )
    dk_write = write * (
        _product("ncsv,nckv->ncsk", v, d_after.C.astype(dtype)) + d_after.n[..., None, :]
    )
    dv = write * _product("ncsk,nckv->ncsv", k, d_after.C.astype(dtype))

    # Through the pairs inside of the chunk.
    weight = jnp.exp(chunks.pair - outputs.m[..., None])
    scores = _product("nctk,ncsk->ncts", q, k) * weight
    d_scores = _product("nctv,ncsv->ncts", d_numerator, v) + d_qn[..., None]
    d_pair = d_scores * scores
    d_products = (d_scores * weight).astype(dtype)
    dq = _product("ncts,ncsk->nctk", d_products, k) + dq_carry
    dk = _product("ncts,nctk->ncsk", d_products, q) + dk_write
    dv += _product("ncts,nctv->ncsv", scores.astype(dtype), d_numerator)

    # The gates. Sums of what spans a forget gate, never differences of sums: with gates nearly shut
    # they are tiny beside what does not span it, and in float32 a difference would be noise.
    q_carry, k_write = jnp.sum(q * dq_carry, axis=-1), jnp.sum(k * dk_write, axis=-1)
    d_i = jnp.sum(d_pair, axis=2) + k_write
    d_log_f = _sum_of_spanning_pairs(d_pair)
    d_log_f += rev_cumsum(q_carry) + rev_cumsum_off(k_write[..., ::-1])[..., ::-1]
    d_log_f += (keep * _dot(before, d_after))[..., None]
    if chunks.reset is not None:
        d_log_f = jnp.where(chunks.reset, 0, d_log_f)
    d_i, d_log_f = _join(d_i, inputs.i), _join(d_log_f, inputs.log_f)

    d_state = MLSTMState(
        d_initial.C.reshape(inputs.state.C.shape),
        d_initial.n.reshape(inputs.state.n.shape),
        jnp.zeros_like(inputs.state.m),
    )
    if config.stabilize_correctly:
        d_m = _dot(inputs.state, d_state)
        if config.return_state:
            left = d_last.m - _dot(last, d_last)
            more_i, more_f, more_m = _gradient_of_last_m(inputs, left)
            d_i, d_log_f, d_m = d_i + more_i, d_log_f + more_f, d_m + more_m
        d_state = d_state._replace(m=d_m)
    return (
        MLSTMInputs(
            _join(dq, inputs.q),
            _join(dk, inputs.k),
            _join(dv, inputs.v),
            d_i,
            d_log_f,
            None,
            d_state,
        ),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _chunkwise(inputs: MLSTMInputs, config: mLSTMBackendFwbwConfig):
    """`h` and the last state of prepared inputs."""
    return _forward(inputs, config)[0]


_chunkwise.defvjp(_forward, _backward)


def mlstm_fwbw_custom_grad(config: mLSTMBackendFwbwConfig):
    """Makes the chunkwise mLSTM function with its hand-written gradient.

    Args:
        config: Options.

    Returns:
        A function of `(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None)`,
        with the shapes of `mLSTMBackend.__call__`, that returns `h (..., T, DHV)`, or
        `(h, (C, n, m))` with `config.return_state`.
    """

    def mlstm_fwbw(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None):
        inputs = prepare_inputs(q, k, v, i, f, initial_C, initial_n, initial_m, reset)
        h, last = _chunkwise(inputs, config)
        return (h, last) if config.return_state else h

    return mlstm_fwbw


class mLSTMBackendFwbw(mLSTMBackend):
    """Backend `fwbw`: chunkwise, linear in `T`, the default for training."""

    config: mLSTMBackendFwbwConfig
    config_class = mLSTMBackendFwbwConfig

    def run(self, inputs):
        """See `mLSTMBackend.run`."""
        return _chunkwise(inputs, dataclasses.replace(self.config, return_state=True))
