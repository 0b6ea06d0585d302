"""The sLSTM: scalar memory, exponential gates, and recurrent weights within each head.

Each pre-activation sums a part of the input and a part of the last output,
`z~_t = z_t + R_z h_(t-1)` and so on, where `R` mixes the channels of a head. For each channel:

    m_t = max(log f_t + m_(t-1), i~_t),  where f_t = sigmoid(f~_t) or exp(f~_t)
    c_t = exp(log f_t + m_(t-1) - m_t) c_(t-1) + exp(i~_t - m_t) tanh(z~_t)
    n_t = exp(log f_t + m_(t-1) - m_t) n_(t-1) + exp(i~_t - m_t)
    h_t = sigmoid(o~_t) c_t / n_t

The zero state is `h = c = n = m = 0`. While `n` is 0, no token has been read and `m` counts as
minus infinity; afterwards `n` is at least 1, so that no gate can make it vanish.

The gradient is hand-written. With `y_t = c_t / n_t` and `L_t = log n_t + m_t` the cell is

    y_t = w_t y_(t-1) + (1 - w_t) tanh(z~_t),   L_t = log(exp(log f_t + L_(t-1)) + exp(i~_t))

where `w_t = exp(log f_t + L_(t-1) - L_t)`, so all terms of its derivative are bounded. The
residuals are `h`, `y` and the odds `w / (1 - w)` of each token. One product for all tokens
recomputes the pre-activations from `h`, and another one yields the gradient of `R`, so that each
step of either pass has one product with `R`.

`xlstm.common_types` describes the notation.

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

# The name of the residuals for `jax.checkpoint_policies`: a policy that saves them spares the
# backward pass a second scan over the tokens.
RESIDUALS = "slstm_tokens"


class SLSTMState(NamedTuple):
    """State after a token; arrays `(B, NH, DH)`, at least float32.

    Attributes:
        h: Output.
        c: Cell.
        n: Normalizer.
        m: Log scale: `c` and `n` are divided by `exp(m)`.
    """

    h: jax.Array
    c: jax.Array
    n: jax.Array
    m: jax.Array


class _Residuals(NamedTuple):
    """Residuals of all tokens for the backward pass, `(T, NH, B, DH)`.

    Attributes:
        h: Output.
        y: `c / n`.
        odds: `w / (1 - w)`.
        from_state: Whether the log scale comes from the previous state; None if no last state is
            returned, since its gradient alone depends on this.
    """

    h: jax.Array
    y: jax.Array
    odds: jax.Array
    from_state: jax.Array | None


def zero_state(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> SLSTMState:
    """Returns the state before a document, of arrays with a shape such as `(B, NH, DH)`."""
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
    """Runs the cell over all tokens; with one token this is a decoding step.

    Args:
        z: Input part of the pre-activations of the cell input, `(B, NH, T, DH)`.
        i: Input part of the pre-activations of the input gates, `(B, NH, T, DH)`.
        f: Input part of the pre-activations of the forget gates, `(B, NH, T, DH)`.
        o: Input part of the pre-activations of the output gates, `(B, NH, T, DH)`.
        recurrent: Recurrent weights `(NH, DH, 4 * DH)`, with columns for z, i, f and o; products
            are computed in their type.
        state: State before the first token; None for the zero state.
        reset: Bool `(B, T)`, or None: True drops the state before that token.
        padding: Bool `(B, T)`, or None: True marks tokens that do not change the state; their
            outputs are meaningless.
        forget_gate: `sigmoid` or `exponential`.
        precision: See `product_precision`.

    Returns:
        The outputs h, `(B, NH, T, DH)`, at least float32, and the last state if `state` was given,
        else None.

    Raises:
        ValueError: If the shapes disagree, or the forget gate is unknown.
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
    state: SLSTMState | None,
    reset: jax.Array | None,
    *,
    precision: lax.Precision | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the complete pre-activations.

    Args:
        x: Input parts of z, i, f and o, each `(B, NH, T, DH)`.
        recurrent: Recurrent weights, see `slstm`.
        h: Outputs of `slstm` for these arguments, `(B, NH, T, DH)`.
        state: See `slstm`.
        reset: See `slstm`.
        precision: See `slstm`.

    Returns:
        z, i, f and o, each `(B, NH, T, DH)`.
    """
    first = jnp.zeros_like(h[:, :, 0]) if state is None else state.h.astype(h.dtype)
    h = jnp.concatenate([first[:, :, None], h[:, :, :-1]], axis=2)
    if reset is not None:
        h = jnp.where(reset[:, None, :, None], 0, h)
    mixed = jnp.split(_mix(h, recurrent, h.dtype, precision), 4, axis=-1)
    return tuple(part + more for part, more in zip(x, mixed, strict=True))


def _check(z, i, f, o, recurrent, forget_gate) -> None:
    if z.ndim != 4 or not z.shape == i.shape == f.shape == o.shape:
        raise ValueError(
            f"z, i, f and o have the shapes {z.shape}, {i.shape}, {f.shape} and {o.shape};"
            " expected one shape (B, NH, T, DH)"
        )
    _, num_heads, _, head_dim = z.shape
    if recurrent.shape != (num_heads, head_dim, 4 * head_dim):
        raise ValueError(
            f"recurrent has the shape {recurrent.shape}, expected"
            f" {(num_heads, head_dim, 4 * head_dim)}"
        )
    if forget_gate not in FORGET_GATES:
        raise ValueError(
            f"forget_gate={forget_gate!r} is unknown; expected one of {', '.join(FORGET_GATES)}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _slstm(x, recurrent, state, masks, forget_gate, with_state, precision):
    """Runs the cell on transposed arrays: `x (T, NH, B, 4 * DH)`, `state (NH, B, DH)`."""
    last, tokens = _forward(x, recurrent, state, masks, forget_gate, with_state, precision)
    return tokens.h, last if with_state else None


def _slstm_fwd(x, recurrent, state, masks, forget_gate, with_state, precision):
    last, tokens = _forward(x, recurrent, state, masks, forget_gate, with_state, precision)
    tokens = jax.tree.map(lambda leaf: checkpoint_name(leaf, RESIDUALS), tokens)
    last = last if with_state else None
    return (tokens.h, last), (x, recurrent, state, masks, tokens, last)


def _forward(
    x, recurrent, state, masks, forget_gate, with_state, precision
) -> tuple[SLSTMState, _Residuals]:
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
        # One exponential and a selection would take XLA on CPU several times as long.
        keep, write = jnp.exp(carried - new_m), jnp.exp(i - new_m)
        new_c, new_n = keep * c + write * jnp.tanh(z), keep * n + write
        y = new_c / new_n
        new = SLSTMState(jax.nn.sigmoid(o) * y, new_c, new_n, new_m)
        if padding is not None:
            new = _where(padding, state, new)
        return new, _Residuals(new.h, y, keep * n / write, carried >= i if with_state else None)

    # Where n = 0 no token has been read: the first one sets the log scale.
    state = state._replace(m=jnp.where(state.n == 0, -jnp.inf, state.m))
    state, residuals = lax.scan(body, state, (x, masks))
    return state._replace(m=jnp.where(state.n == 0, 0, state.m)), residuals


def _slstm_bwd(forget_gate, with_state, precision, residuals, cotangents):
    x, recurrent, state, masks, forward, last = residuals
    dh, dlast = cotangents
    dtype, has_read = state.c.dtype, state.n != 0
    n = jnp.where(has_read, state.n, 1)
    h_before = jnp.concatenate([state.h[None], forward.h[:-1]])
    y_before = jnp.concatenate([jnp.where(has_read, state.c / n, 0)[None], forward.y[:-1]])
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
        write = 1 / (1 + odds)
        keep = jnp.where(odds > 1, 1 - write, odds * write)  # Each form is exact where it is small.
        dy = carry.y + dh * o
        dl_before = dy * (y_before - z) * keep * write + carry.log * keep
        di, df = carry.log - dl_before, dl_before
        dm = None
        if from_state is not None:
            dm = jnp.where(from_state, carry.m, 0)
            di, df = di + carry.m - dm, df + dm
        if forget_gate == "sigmoid":
            df = df * jax.nn.sigmoid(-f)
        dx = jnp.concatenate([dy * write * (1 - z * z), di, df, dh * y * o * (1 - o)], axis=-1)
        if padding is not None:
            dx = jnp.where(padding, 0, dx)
        dh_before = _mix(dx, transposed, dtype, precision)
        if reset is not None:
            dh_before = jnp.where(reset, 0, dh_before)
        new = _Cotangents(dh_before, dy * keep, dl_before, dm)
        if padding is not None:
            new = _where(padding, carry._replace(h=dh), new)
        return new, dx

    zeros = jnp.zeros_like(state.c)
    carry = _Cotangents(zeros, zeros, zeros, None)
    if with_state:
        # m matters to the state alone: c and n, scaled by any other m, describe the same cell.
        dl = dlast.c * last.c + dlast.n * last.n
        carry = _Cotangents(dlast.h, dlast.c * last.n, dl, dlast.m - dl)
    tokens = (dh, preactivations, forward.y, y_before, forward.odds, forward.from_state, masks)
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
    """Cotangents of h, y = c / n, L = log n + m, and of m apart from L; each `(NH, B, DH)`."""

    h: jax.Array
    y: jax.Array
    log: jax.Array
    m: jax.Array | None


def _mix(
    h: jax.Array, recurrent: jax.Array, dtype: jnp.dtype, precision: lax.Precision | None
) -> jax.Array:
    """Multiplies `(..., NH, B, DH)` by the weights of each head, in their type; returns `dtype`."""
    return jnp.einsum(
        "...nbd,nde->...nbe",
        h.astype(recurrent.dtype),
        recurrent,
        precision=product_precision(precision, recurrent),
        preferred_element_type=dtype,
    )


def _log_forget(f: jax.Array, forget_gate: str) -> jax.Array:
    """Returns the logarithm of the forget gates."""
    # `jax.nn.log_sigmoid` would also check for NaNs at every token.
    is_sigmoid = forget_gate == "sigmoid"
    return jnp.minimum(f, 0) - jnp.log1p(jnp.exp(-jnp.abs(f))) if is_sigmoid else f


def _where(condition: jax.Array, x: NamedTuple, y: NamedTuple) -> NamedTuple:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
