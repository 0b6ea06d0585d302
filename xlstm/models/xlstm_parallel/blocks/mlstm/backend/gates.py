"""Sums of log forget gates, and their gradients, without cancellation.

The log of a nearly closed forget gate is large, so a difference of two cumulative sums that include
it loses the digits of the other gates. No function here takes such a difference.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rev_cumsum(x: jax.Array) -> jax.Array:
    """Returns inclusive reverse sums over the last axis: entry `r` is the sum over `t >= r`."""
    return lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def rev_cumsum_off(x: jax.Array) -> jax.Array:
    """Returns exclusive reverse sums over the last axis: entry `r` is the sum over `t > r`."""
    # A shift rather than `rev_cumsum(x) - x`, which would lose terms that are small next to `x`.
    return jnp.pad(rev_cumsum(x[..., 1:]), [(0, 0)] * (x.ndim - 1) + [(0, 1)])


def _split_for_exact_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits `x (..., S)` into multiples of a power of two, with exact sums, and a small rest."""
    total = jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
    _, exponent = jnp.frexp(total)
    info = jnp.finfo(x.dtype)
    quantum = jnp.ldexp(jnp.ones_like(total), jnp.maximum(exponent - info.nmant, info.minexp + 2))
    coarse = jnp.round(x / quantum) * quantum
    return coarse, x - coarse


def exact_and_small_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns inclusive sums over the last axis in two parts, whose differences are accurate.

    Args:
        x: Array `(..., S)`.

    Returns:
        Sums without rounding errors, and the small rest of the sums; both `(..., S)`.
    """
    coarse, fine = (jnp.cumsum(part, axis=-1) for part in _split_for_exact_sums(x))
    return coarse, fine


def sum_since(x: jax.Array, start: jax.Array) -> jax.Array:
    """Returns sums over the last axis from given indices on.

    Args:
        x: Array `(..., S)`.
        start: First index of each sum, `(..., S)`, with `start_t <= t`.

    Returns:
        Sums `(..., S)`; entry `t` is the sum over `[start_t, t]`.
    """
    total = jnp.zeros_like(x)
    for part in _split_for_exact_sums(x):
        sums = jnp.cumsum(part, axis=-1)
        total += sums - jnp.take_along_axis(sums - part, start, axis=-1)
    return total


@jax.custom_vjp
def causal_forget_matrix(forget_gates: jax.Array) -> jax.Array:
    """Returns the log weights of every token in every later one.

    Args:
        forget_gates: Log forget gates `(..., S)`.

    Returns:
        Log weights `(..., S, S)`; entry `[t, s]` is the sum over `(s, t]`, -inf above the diagonal.
    """
    size = forget_gates.shape[-1]
    coarse, fine = exact_and_small_sums(forget_gates)
    # The difference of the coarse sums is exact; the fine sums are small, and so is their error.
    sums = coarse[..., :, None] - coarse[..., None, :] + (fine[..., :, None] - fine[..., None, :])
    return jnp.where(jnp.tril(jnp.ones((size, size), bool)), sums, -jnp.inf)


def documents(log_f: jax.Array, reset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the document of each token, and the log weight of the zero state before it.

    Args:
        log_f: Log forget gates `(..., S)`.
        reset: Bool `(..., S)`, True where the state is dropped before the token.

    Returns:
        The number of resets up to the token, and, where that is not 0, the log weight at the token
        of the zero state after the last reset, whose `m = 0` bounds the log scale. Both `(..., S)`.
    """
    return jnp.cumsum(reset, axis=-1), sum_since(log_f, document_starts(reset))


def document_starts(reset: jax.Array) -> jax.Array:
    """Returns the index of the last reset up to each token `(..., S)`; 0 before the first one."""
    return lax.cummax(jnp.where(reset, jnp.arange(reset.shape[-1]), 0), axis=reset.ndim - 1)


def pair_log_weights(i: jax.Array, log_f: jax.Array, document: jax.Array | None) -> jax.Array:
    """Returns the log weights of tokens `s` in tokens `t`.

    Args:
        i: Input gate pre-activations `(..., S)`.
        log_f: Log forget gates `(..., S)`.
        document: Number of resets up to the token `(..., S)`; None without resets.

    Returns:
        Log weights `(..., S, S)`, entry `[t, s]`; -inf for later tokens and other documents.
    """
    pairs = causal_forget_matrix(log_f) + i[..., None, :]
    if document is None:
        return pairs
    return jnp.where(document[..., :, None] == document[..., None, :], pairs, -jnp.inf)


def sum_of_spanning_pairs(pairs: jax.Array) -> jax.Array:
    """Returns, for each token `r`, the sum over the pairs with `t >= r > s`.

    This is the transpose of `causal_forget_matrix`.

    Args:
        pairs: Values `(..., S, S)`, entry `[t, s]`.

    Returns:
        Sums `(..., S)`.
    """
    ones = jnp.ones(pairs.shape[-2:], pairs.dtype)
    reached = jnp.einsum("...ts,sr->...tr", pairs, jnp.triu(ones, 1), precision="highest")
    return jnp.sum(jnp.where(jnp.tril(ones) > 0, reached, 0), axis=-2)


causal_forget_matrix.defvjp(
    lambda forget_gates: (causal_forget_matrix(forget_gates), None),
    lambda _, pairs: (sum_of_spanning_pairs(pairs),),
)


def gradients_of_gates(
    written: jax.Array,
    spanning: jax.Array,
    q_carry: jax.Array,
    k_write: jax.Array,
    through_states: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the input gates and of the log forget gates.

    They are sums of the terms that span a forget gate, never differences of sums: with nearly
    closed gates these terms are tiny, and a float32 difference is noise.

    Args:
        written: Sums, for each token `s`, of the gradients of the log weights of its pairs with
            tokens `t` of the chunk `(N, NC, L)`.
        spanning: Those of the pairs that span a forget gate, see `sum_of_spanning_pairs`.
        q_carry: Gradients of the log weights of the state before the chunk in its tokens.
        k_write: Those of the tokens in the state after the chunk `(N, NC, L)`.
        through_states: Those of the state before the chunk in the state after it `(N, NC)`.

    Returns:
        The gradients, both `(N, NC, L)`.
    """
    d_log_f = spanning + rev_cumsum(q_carry) + rev_cumsum_off(k_write[..., ::-1])[..., ::-1]
    return written + k_write, d_log_f + through_states[..., None]


def gradient_of_last_m(
    i: jax.Array, log_f: jax.Array, initial_m: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the derivatives of the last `m`, which is a maximum of sums of gates.

    The derivative by what sets the maximum, and by the log forget gates after it, is 1.

    Args:
        i: Input gate pre-activations `(..., T)`.
        log_f: Log forget gates `(..., T)`.
        initial_m: Initial `m (...)`.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.

    Returns:
        Derivatives by `i (..., T)`, by `log_f (..., T)` and by the initial `m (...)`.
    """
    time = i.shape[-1]
    to_end = rev_cumsum_off(log_f)  # Sum of the log forget gates after the token.
    start = jnp.zeros(initial_m.shape, int)
    is_carried = jnp.ones(initial_m.shape, bool)
    if reset is not None:
        start = jnp.max(jnp.where(reset, jnp.arange(time), 0), axis=-1)
        is_carried = ~jnp.any(reset, axis=-1)
    in_document = jnp.arange(time) >= start[..., None]
    token = jnp.where(in_document, i + to_end, -jnp.inf)
    first = jnp.take_along_axis(to_end + log_f, start[..., None], axis=-1)[..., 0]
    carry = first + jnp.where(is_carried, initial_m, 0)
    from_token = jnp.max(token, axis=-1) >= carry
    source = jnp.where(from_token, jnp.argmax(token, axis=-1), start - 1)
    d_i = from_token[..., None] & (jnp.arange(time) == source[..., None])
    d_log_f = jnp.arange(time) > source[..., None]
    d_m0 = ~from_token & is_carried
    return d_i.astype(i.dtype), d_log_f.astype(i.dtype), d_m0.astype(i.dtype)
