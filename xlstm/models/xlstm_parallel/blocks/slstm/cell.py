"""The sLSTM: scalar memory, exponential gates, and heads whose channels mix from token to token.

For each channel, with pre-activations that have a part of the input and one of the last output,
`z~_t = z_t + R_z h_(t-1)` and so on, where `R` mixes the channels of a head:

    m_t = max(log f_t + m_(t-1), i~_t),  where f_t = sigmoid(f~_t) or exp(f~_t)
    c_t = exp(log f_t + m_(t-1) - m_t) c_(t-1) + exp(i~_t - m_t) tanh(z~_t)
    n_t = exp(log f_t + m_(t-1) - m_t) n_(t-1) + exp(i~_t - m_t)
    h_t = sigmoid(o~_t) c_t / n_t

The zero state is `h = c = n = m = 0`. Where `n` is 0 nothing has been read yet, and `m` counts as
minus infinity: so `n` is never below 1 afterwards, and no gate can make it vanish.

The gradient has a rule of its own. With `y_t = c_t / n_t` and `L_t = log n_t + m_t` the cell is

    y_t = w_t y_(t-1) + (1 - w_t) tanh(z~_t),   L_t = log(exp(log f_t + L_(t-1)) + exp(i~_t))

where `w_t = exp(log f_t + L_(t-1) - L_t)`: all terms of its derivative are bounded. Of each token
`h`, `y` and the odds `w / (1 - w)` are kept; the pre-activations follow from `h` in one product for
all tokens, and so does the gradient of `R`: a step of either pass has one product with `R`.

Sizes: B batch, NH heads, T tokens, DH channels of a head.

References:
    Beck et al., "xLSTM", 2024 (arXiv 2405.04517), section 2.2 and appendix A.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from xlstm.models.shared.precision import product_precision
from xlstm.models.xlstm_parallel.config import FORGET_GATES

# What the forward pass keeps, under this name for `jax.checkpoint_policies`: whoever keeps it too
# need not go through the tokens again.
KEPT = "slstm_tokens"


class SLSTMState(NamedTuple):
    """State after a token, at least float32 `(B, NH, DH)`.

    Attributes:
        h: The output.
        c: The cell.
        n: The normalizer.
        m: The stabilizer, a logarithm.
    """

    h: jax.Array
    c: jax.Array
    n: jax.Array
    m: jax.Array


class _Kept(NamedTuple):
    """What the backward pass gets of every token, `(T, NH, B, DH)`; `y` is c / n.

    `from_state`, where the stabilizer comes from the state before, is there if that counts.
    """

    h: jax.Array
    y: jax.Array
    odds: jax.Array
    from_state: jax.Array | None


def zero_state(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> SLSTMState:
    """The state before a document; `shape` is that of each array, such as `(B, NH, DH)`."""
    return SLSTMState(*(jnp.zeros(shape, dtype) for _ in SLSTMState._fields))


def slstm(
    z: jax.Array,
    i: jax.Array,
    f: jax.Array,
    o: jax.Array,
    recurrent: jax.Array,
    state: SLSTMState | None = None,
    *,
    reset: jax.Array | None = None,
    padding: jax.Array | None = None,
    forget_gate: str = "sigmoid",
    precision: lax.Precision | None = None,
) -> tuple[jax.Array, SLSTMState | None]:
    """Runs the cell over all tokens, which for one token is a step of decoding.

    Args:
        z: The input's part of the cell input's pre-activations, `(B, NH, T, DH)`.
        i: That of the input gates'.
        f: That of the forget gates'.
        o: That of the output gates'.
        recurrent: Recurrent weights `(NH, DH, 4 * DH)`, columns for z, i, f and o; products are in
            their type.
        state: State before the first token; None for the zero state.
        reset: Where the state is dropped before the token, bool `(B, T)`, or None.
        padding: Which tokens leave the state as it is, bool `(B, T)`, or None; their outputs mean
            nothing.
        forget_gate: `sigmoid` or `exponential`.
        precision: How exactly float32 is multiplied, see `product_precision`.

    Returns:
        The outputs h, `(B, NH, T, DH)`, at least float32, and the last state if `state` was given,
        else None.

    Raises:
        ValueError: If shapes do not fit each other, or there is no such forget gate.
    """
    _check(z, i, f, o, recurrent, forget_gate)
    batch, num_heads, _, head_dim = z.shape
    x = jnp.concatenate([z, i, f, o], axis=-1).transpose(2, 1, 0, 3)
    first = zero_state((batch, num_heads, head_dim)) if state is None else state
    dtype = jnp.promote_types(jnp.result_type(x, *first), jnp.float32)
    first = SLSTMState(*(leaf.astype(dtype).swapaxes(0, 1) for leaf in first))
    masks = tuple(None if mask is None else mask.T[:, None, :, None] for mask in (reset, padding))
    h, last = _slstm(x, recurrent, first, masks, forget_gate, state is not None, precision)
    if last is not None:
        last = SLSTMState(*(leaf.swapaxes(0, 1) for leaf in last))
    return h.transpose(2, 1, 0, 3), last


def gate_preactivations(
    x: tuple[jax.Array, ...],
    recurrent: jax.Array,
    h: jax.Array,
    reset: jax.Array | None,
    *,
    precision: lax.Precision | None = None,
) -> tuple[jax.Array, ...]:
    """The whole pre-activations of documents that the zero state came before.

    Args:
        x: The inputs' parts of z, i, f and o, each `(B, NH, T, DH)`.
        recurrent: Recurrent weights, see `slstm`.
        h: What `slstm` made of them, `(B, NH, T, DH)`.
        reset: See `slstm`.
        precision: See `slstm`.

    Returns:
        z, i, f and o, each `(B, NH, T, DH)`.
    """
    h = jnp.pad(h, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    if reset is not None:
        h = jnp.where(reset[:, None, :, None], 0, h)
    mixed = jnp.split(_mix(h, recurrent, h.dtype, precision), 4, axis=-1)
    return tuple(part + more for part, more in zip(x, mixed, strict=True))


def _check(z, i, f, o, recurrent, forget_gate) -> None:
    if z.ndim != 4 or not z.shape == i.shape == f.shape == o.shape:
        raise ValueError(
            "z, i, f and o must be alike, (B, NH, T, DH), not"
            f" {z.shape}, {i.shape}, {f.shape} and {o.shape}"
        )
    _, num_heads, _, head_dim = z.shape
    if recurrent.shape != (num_heads, head_dim, 4 * head_dim):
        raise ValueError(
            f"recurrent has the shape {recurrent.shape}, expected"
            f" {(num_heads, head_dim, 4 * head_dim)}"
        )
    if forget_gate not in FORGET_GATES:
        raise ValueError(f"forget_gate={forget_gate!r}: there are {', '.join(FORGET_GATES)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _slstm(x, recurrent, state, masks, forget_gate, with_state, precision):
    """With time first and heads before examples: `x (T, NH, B, 4 * DH)`, `state (NH, B, DH)`."""
    last, kept = _forward(x, recurrent, state, masks, forget_gate, with_state, precision)
    return kept.h, last if with_state else None


def _slstm_fwd(x, recurrent, state, masks, forget_gate, with_state, precision):
    last, kept = _forward(x, recurrent, state, masks, forget_gate, with_state, precision)
    kept = jax.tree.map(lambda leaf: checkpoint_name(leaf, KEPT), kept)
    last = last if with_state else None
    return (kept.h, last), (x, recurrent, state, masks, kept, last)


def _forward(
    x, recurrent, state, masks, forget_gate, with_state, precision
) -> tuple[SLSTMState, _Kept]:
    dtype = state.c.dtype

    def body(state, token):
        x, (reset, padding) = token
        h, c, n, m = state
        if reset is not None:
            h = jnp.where(reset, 0, h)
        z, i, f, o = jnp.split(x.astype(dtype) + _mix(h, recurrent, dtype, precision), 4, axis=-1)
        carried = _log_forget(f, forget_gate) + m
        if reset is not None:
            carried = jnp.where(reset, -jnp.inf, carried)
        new_m = jnp.maximum(carried, i)
        # Two exponentials: with one, and a choice, XLA on CPU takes several times as long.
        keep, write = jnp.exp(carried - new_m), jnp.exp(i - new_m)
        new_c, new_n = keep * c + write * jnp.tanh(z), keep * n + write
        y = new_c / new_n
        new = SLSTMState(jax.nn.sigmoid(o) * y, new_c, new_n, new_m)
        if padding is not None:
            new = _where(padding, state, new)
        return new, _Kept(new.h, y, keep * n / write, carried >= i if with_state else None)

    # Nothing has been read where n = 0: whatever comes first sets the stabilizer.
    state = state._replace(m=jnp.where(state.n == 0, -jnp.inf, state.m))
    state, kept = lax.scan(body, state, (x, masks))
    return state._replace(m=jnp.where(state.n == 0, 0, state.m)), kept


def _slstm_bwd(forget_gate, with_state, precision, residuals, cotangents):
    x, recurrent, state, masks, kept, last = residuals
    dh, dlast = cotangents
    dtype, has_read = state.c.dtype, state.n != 0
    n = jnp.where(has_read, state.n, 1)
    h_before = jnp.concatenate([state.h[None], kept.h[:-1]])
    y_before = jnp.concatenate([jnp.where(has_read, state.c / n, 0)[None], kept.y[:-1]])
    reset, _ = masks
    if reset is not None:
        h_before = jnp.where(reset, 0, h_before)
    preactivations = x.astype(dtype) + _mix(h_before, recurrent, dtype, precision)
    transposed = recurrent.swapaxes(1, 2)

    def body(carry, token):
        dh, x, y, y_before, odds, from_state, (reset, padding) = token
        dh = dh + carry.h
        z, _, f, o = jnp.split(x, 4, axis=-1)
        z, o = jnp.tanh(z), jax.nn.sigmoid(o)
        added = 1 / (1 + odds)
        kept = jnp.where(odds > 1, 1 - added, odds * added)  # Either is exact where it is small.
        dy = carry.y + dh * o
        dl_before = dy * (y_before - z) * kept * added + carry.log * kept
        di, df = carry.log - dl_before, dl_before
        dm = None
        if from_state is not None:
            dm = jnp.where(from_state, carry.m, 0)
            di, df = di + carry.m - dm, df + dm
        if forget_gate == "sigmoid":
            df = df * jax.nn.sigmoid(-f)
        dx = jnp.concatenate([dy * added * (1 - z * z), di, df, dh * y * o * (1 - o)], axis=-1)
        if padding is not None:
            dx = jnp.where(padding, 0, dx)
        dh_before = _mix(dx, transposed, dtype, precision)
        if reset is not None:
            dh_before = jnp.where(reset, 0, dh_before)
        new = _Cotangents(dh_before, dy * kept, dl_before, dm)
        if padding is not None:
            new = _where(padding, carry._replace(h=dh), new)
        return new, dx

    zeros = jnp.zeros_like(state.c)
    carry = _Cotangents(zeros, zeros, zeros, None)
    if with_state:
        # The stabilizer is in the states alone: c and n together say the same with any other.
        dl = dlast.c * last.c + dlast.n * last.n
        carry = _Cotangents(dlast.h, dlast.c * last.n, dl, dlast.m - dl)
    tokens = (dh, preactivations, kept.y, y_before, kept.odds, kept.from_state, masks)
    first, dx = lax.scan(body, carry, tokens, reverse=True)
    drecurrent = jnp.einsum(
        "tnbd,tnbe->nde",
        h_before.astype(recurrent.dtype),
        dx.astype(recurrent.dtype),
        precision=product_precision(precision, recurrent),
        preferred_element_type=dtype,
    )
    dstate = SLSTMState(
        h=first.h,
        c=jnp.where(has_read, first.y / n, 0),
        n=jnp.where(has_read, (first.log - first.y * state.c / n) / n, 0),
        m=jnp.where(has_read, first.log + (first.m if with_state else 0), 0),
    )
    return dx.astype(x.dtype), drecurrent.astype(recurrent.dtype), dstate, (None, None)


_slstm.defvjp(_slstm_fwd, _slstm_bwd)


class _Cotangents(NamedTuple):
    """Cotangents of h, y = c / n, L = log n + m, and of m beyond its part in L; `(NH, B, DH)`."""

    h: jax.Array
    y: jax.Array
    log: jax.Array
    m: jax.Array | None


def _mix(
    h: jax.Array, recurrent: jax.Array, dtype: jnp.dtype, precision: lax.Precision | None
) -> jax.Array:
    """Products of `(..., NH, B, DH)` with weights of heads, in their type; `dtype` comes out."""
    return jnp.einsum(
        "...nbd,nde->...nbe",
        h.astype(recurrent.dtype),
        recurrent,
        precision=product_precision(precision, recurrent),
        preferred_element_type=dtype,
    )


def _log_forget(f: jax.Array, forget_gate: str) -> jax.Array:
    """The logarithm of the forget gates."""
    # `jax.nn.log_sigmoid` would look for NaNs besides, at every token.
    is_sigmoid = forget_gate == "sigmoid"
    return jnp.minimum(f, 0) - jnp.log1p(jnp.exp(-jnp.abs(f))) if is_sigmoid else f


def _where(condition: jax.Array, x: NamedTuple, y: NamedTuple) -> NamedTuple:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
