"""The mLSTM written down once more, from its equations and in float64, to test the backends by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax


class Arguments(NamedTuple):
    """What a backend is called with and differentiated for; the last three are the first state."""

    q: Any
    k: Any
    v: Any
    i: Any
    f: Any
    C: Any
    n: Any
    m: Any


def random_arguments(
    seed: int,
    leading: tuple[int, ...],
    time: int,
    *,
    qk_dim: int = 4,
    v_dim: int = 6,
    igate_bias: float = 0.0,
    fgate_bias: float = 3.0,
    with_state: bool = True,
    one_sign: bool = False,
) -> Arguments:
    """Draws normal arguments, in float32.

    Args:
        seed: Of the random numbers.
        leading: Leading axes, such as `(B, NH)`.
        time: `T`.
        qk_dim: `DHQK`.
        v_dim: `DHV`.
        igate_bias: Mean of the input gate pre-activations.
        fgate_bias: Mean of the forget gate pre-activations.
        with_state: Whether the state is random instead of zero.
        one_sign: Whether `q`, `k` and `n` are made positive. Where the bound of the normalizer is
            tiny, as with wide open input gates, this keeps the division well-conditioned.

    Returns:
        `q, k (..., T, DHQK)`, `v (..., T, DHV)`, `i, f (..., T)` and the state before them.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    sign = np.abs if one_sign else lambda x: x
    state_scale = np.float32(with_state)
    return Arguments(
        q=sign(normal(*leading, time, qk_dim)),
        k=sign(normal(*leading, time, qk_dim)),
        v=normal(*leading, time, v_dim),
        i=normal(*leading, time) + np.float32(igate_bias),
        f=normal(*leading, time) + np.float32(fgate_bias),
        C=normal(*leading, qk_dim, v_dim) * state_scale,
        n=sign(normal(*leading, qk_dim)) * state_scale,
        m=normal(*leading) * state_scale,
    )


def random_cotangents(seed: int, arguments: Arguments):
    """Draws normal cotangents of `(h, (C, n, m))`, in float32."""
    rng = np.random.default_rng(seed)
    outputs = (arguments.v, (arguments.C, arguments.n, arguments.m))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), outputs)


def _step(xp, constant: Callable, stabilize_correctly: bool, state, token, reset):
    """One token; `constant` marks what is held constant if not `stabilize_correctly`."""
    q, k, v, i, f = token
    C, n, m = (
        xp.where(xp.reshape(reset, reset.shape + (1,) * (x.ndim - reset.ndim)), 0.0, x)
        for x in state
    )
    if stabilize_correctly:
        constant = lambda x: x  # noqa: E731
    q = q / np.sqrt(q.shape[-1])
    log_f = -xp.logaddexp(0.0, -f)
    m_new = constant(xp.maximum(log_f + m, i))
    keep, write = xp.exp(log_f + m - m_new), xp.exp(i - m_new)
    C = keep[..., None, None] * C + write[..., None, None] * k[..., :, None] * v[..., None, :]
    n = keep[..., None] * n + write[..., None] * k
    bound = xp.exp(-m_new) if stabilize_correctly else 1.0
    denominator = constant(xp.maximum(xp.abs((n * q).sum(-1)), bound))
    h = (C * q[..., :, None]).sum(-2) / denominator[..., None]
    return (C, n, m_new), h


def _time_first(arguments: Arguments, reset):
    leading = reset.ndim - 1
    return jax.tree.map(lambda x: np.moveaxis(x, leading, 0), (tuple(arguments[:5]), reset))


def oracle(arguments: Arguments, reset: np.ndarray, *, stabilize_correctly: bool):
    """The mLSTM token by token with NumPy in float64.

    Args:
        arguments: Arguments over `T` tokens.
        reset: Where the state is dropped before the token, bool `(..., T)`.
        stabilize_correctly: Whether the normalizer's bound is `exp(-m)` and not 1.

    Returns:
        `h (..., T, DHV)` and the last state `(C, n, m)`.
    """
    arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    tokens, resets = _time_first(arguments, reset)
    state, hs = tuple(arguments[5:]), []
    for t in range(reset.shape[-1]):
        token = [x[t] for x in tokens]
        state, h = _step(np, lambda x: x, stabilize_correctly, state, token, resets[t])
        hs.append(h)
    return np.stack(hs, axis=reset.ndim - 1), state


def oracle_gradients(
    arguments: Arguments, reset: np.ndarray, cotangents, *, stabilize_correctly: bool
) -> Arguments:
    """The gradient of the mLSTM token by token, by JAX's own differentiation in float64.

    Without `stabilize_correctly` the denominator and `m` are held constant.

    Args:
        arguments: Arguments over `T` tokens.
        reset: Where the state is dropped before the token, bool `(..., T)`.
        cotangents: Cotangents of what `oracle` returns.
        stabilize_correctly: Whether the normalizer's bound is `exp(-m)` and not 1.

    Returns:
        The gradients of the arguments.
    """
    with jax.enable_x64(True):
        to_float64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
        arguments, cotangents = jax.tree.map(to_float64, (arguments, cotangents))
        grads = _jitted_gradients(arguments, reset, cotangents, stabilize_correctly)
        return jax.tree.map(np.asarray, grads)


def _gradients(arguments, reset, cotangents, stabilize_correctly):
    jnp = jax.numpy

    def run(arguments):
        leading = reset.ndim - 1
        first = lambda x: jnp.moveaxis(x, leading, 0)  # noqa: E731
        *tokens, C, n, m = arguments
        if not stabilize_correctly:
            m = lax.stop_gradient(m)
        last, h = lax.scan(
            lambda state, xs: _step(jnp, lax.stop_gradient, stabilize_correctly, state, *xs),
            (C, n, m),
            (jax.tree.map(first, tokens), first(reset)),
        )
        return jnp.moveaxis(h, 0, leading), last

    return jax.vjp(run, arguments)[1](cotangents)[0]


def _quick_compilation() -> dict[str, Any]:
    """Compiler options that save most of a test's time; the second is not in every XLA."""
    options = {"xla_backend_optimization_level": 0}
    fewer_passes = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=fewer_passes).lower().compile()
    except RuntimeError:
        return options
    return fewer_passes


QUICK_COMPILATION = _quick_compilation()
_jitted_gradients = jax.jit(
    _gradients, static_argnames="stabilize_correctly", compiler_options=QUICK_COMPILATION
)


def outputs_and_gradients(cell: Callable, arguments: Arguments, reset, cotangents):
    """Runs a function that is to be tested, and differentiates it.

    Args:
        cell: `cell(arguments, reset) -> (h, (C, n, m))`.
        arguments: The arguments that it is differentiated for.
        reset: Where the state is dropped before the token, bool `(..., T)`, or None.
        cotangents: Cotangents of what it returns.

    Returns:
        What it returns, and the gradients of the arguments.
    """

    def run(arguments, reset, cotangents):
        def as_tuples(arguments):
            h, state = cell(arguments, reset)
            return h, tuple(state)

        outputs, vjp = jax.vjp(as_tuples, arguments)
        return outputs, vjp(cotangents)[0]

    return jax.jit(run, compiler_options=QUICK_COMPILATION)(arguments, reset, cotangents)


def relative_error(actual, expected) -> float:
    """The norm of the error over the norm of the expected array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
