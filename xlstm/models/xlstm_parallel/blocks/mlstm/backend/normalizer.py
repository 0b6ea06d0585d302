"""The division by the normalizer of the mLSTM, and its gradient."""

import functools

import jax
import jax.numpy as jnp

# Larger gradients carry no information: the normalizer nearly cancels in the sum that forms it.
_LARGEST_GRADIENT = 1e20


def normalizer_bound(m: jax.Array, stabilize_correctly: bool) -> jax.Array:
    """Returns the least absolute value of the denominator.

    Args:
        m: Log scale `(...)`.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        The bound `(...)`, above zero.
    """
    if not stabilize_correctly:
        return jnp.ones_like(m)
    # With a large m, exp(-m) underflows to zero, by which we must not divide.
    return jnp.maximum(jnp.exp(-m), float(jnp.finfo(m.dtype).tiny) ** 0.25)


def denominator(qn: jax.Array, m: jax.Array, stabilize_correctly: bool) -> jax.Array:
    """Returns the denominator `(...)` of `divide_by_normalizer`."""
    return jnp.maximum(jnp.abs(qn), normalizer_bound(m, stabilize_correctly))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def divide_by_normalizer(
    numerator: jax.Array, qn: jax.Array, m: jax.Array, stabilize_correctly: bool
) -> jax.Array:
    """Returns the output of the cell for a stabilized numerator and normalizer.

    The log scale `m` is a constant of the gradient, since `h` does not depend on it.

    Args:
        numerator: `C_t^T q_t`, `(..., DHV)`.
        qn: `n_t . q_t`, `(...)`.
        m: Log scale `(...)`.
        stabilize_correctly: Whether the normalizer is bounded by `exp(-m)`, which makes the output
            independent of `m`, instead of 1. With 1 the denominator is a constant of the gradient,
            which is exact if a scale-invariant norm follows.

    Returns:
        `h (..., DHV)`, finite even where the normalizer is zero.
    """
    return numerator / denominator(qn, m, stabilize_correctly)[..., None]


def normalizer_gradients(
    dh: jax.Array, h: jax.Array, qn: jax.Array, m: jax.Array, stabilize_correctly: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `divide_by_normalizer`.

    Args:
        dh: Gradient of the output `(..., DHV)`.
        h: Output `(..., DHV)`.
        qn: `n_t . q_t`, `(...)`.
        m: Log scale `(...)`.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        The gradients of the numerator `(..., DHV)` and of `qn (...)`.
    """
    divisor = denominator(qn, m, stabilize_correctly)
    d_numerator = dh / divisor[..., None]
    if not stabilize_correctly:
        return d_numerator, jnp.zeros_like(qn)
    d_qn = -jnp.sign(qn) * jnp.sum(dh * h, axis=-1) / divisor
    is_qn = jnp.abs(qn) > normalizer_bound(m, stabilize_correctly)
    return d_numerator, jnp.where(is_qn, bound_gradient(d_qn), 0)


def bound_gradient(d_qn: jax.Array) -> jax.Array:
    """Bounds the magnitude of a gradient of `qn`, so that products with it stay finite."""
    return jnp.clip(d_qn, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)


def _forward(numerator, qn, m, stabilize_correctly):
    h = divide_by_normalizer(numerator, qn, m, stabilize_correctly)
    return h, (h, qn, m)


def _backward(stabilize_correctly, residuals, dh):
    return *normalizer_gradients(dh, *residuals, stabilize_correctly), None


divide_by_normalizer.defvjp(_forward, _backward)
