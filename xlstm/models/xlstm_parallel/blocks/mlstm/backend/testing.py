"""A float64 reference of the mLSTM, written from its equations, for tests of the backends."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec


class Arguments(NamedTuple):
    """Arguments of a backend; `C`, `n` and `m` are the initial state."""

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
) -> Arguments:
    """Draws normal arguments, in float32.

    Args:
        seed: Seed of the random numbers.
        leading: Leading axes, such as `(B, NH)`.
        time: `T`.
        qk_dim: `DHQK`.
        v_dim: `DHV`.
        igate_bias: Mean of the input gate pre-activations.
        fgate_bias: Mean of the forget gate pre-activations.
        with_state: Whether the state is random instead of zero.

    Returns:
        `q, k (..., T, DHQK)`, `v (..., T, DHV)`, `i, f (..., T)` and the initial state.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    state_scale = np.float32(with_state)
    return Arguments(
        q=normal(*leading, time, qk_dim),
        k=normal(*leading, time, qk_dim),
        v=normal(*leading, time, v_dim),
        i=normal(*leading, time) + np.float32(igate_bias),
        f=normal(*leading, time) + np.float32(fgate_bias),
        C=normal(*leading, qk_dim, v_dim) * state_scale,
        n=normal(*leading, qk_dim) * state_scale,
        m=normal(*leading) * state_scale,
    )


def random_cotangents(seed: int, arguments: Arguments):
    """Draws normal cotangents of `(h, (C, n, m))`, in float32."""
    rng = np.random.default_rng(seed)
    outputs = (arguments.v, (arguments.C, arguments.n, arguments.m))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), outputs)


def _step(xp, constant: Callable, stabilize_correctly: bool, state, token, reset):
    """Runs one token; `constant` marks constants of the gradient if not `stabilize_correctly`."""
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
    # Where n and q are nearly orthogonal, the function is ill-conditioned.
    norms = xp.sqrt((n * n).sum(-1) * (q * q).sum(-1))
    return (C, n, m_new), (h, xp.abs((n * q).sum(-1)) >= 0.05 * norms)


def _time_first(arguments: Arguments, reset):
    leading = reset.ndim - 1
    return jax.tree.map(lambda x: np.moveaxis(x, leading, 0), (tuple(arguments[:5]), reset))


def oracle(arguments: Arguments, reset: np.ndarray, *, stabilize_correctly: bool):
    """Runs the mLSTM token by token with NumPy in float64.

    Args:
        arguments: Arguments over `T` tokens.
        reset: Bool `(..., T)`, True where the state is dropped before the token.
        stabilize_correctly: Whether the normalizer is bounded by `exp(-m)` instead of 1.

    Returns:
        `h (..., T, DHV)`; the last state `(C, n, m)`; and where the function is well-conditioned,
        that is, the normalizer is not close to zero, bool `(..., T)`.
    """
    arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    tokens, resets = _time_first(arguments, reset)
    state, outputs = tuple(arguments[5:]), []
    for t in range(reset.shape[-1]):
        token = [x[t] for x in tokens]
        state, output = _step(np, lambda x: x, stabilize_correctly, state, token, resets[t])
        outputs.append(output)
    h, is_well_conditioned = (np.stack(x, axis=reset.ndim - 1) for x in zip(*outputs, strict=True))
    return h, state, is_well_conditioned


def oracle_gradients(
    arguments: Arguments, reset: np.ndarray, cotangents, *, stabilize_correctly: bool
) -> Arguments:
    """Computes the gradients of the mLSTM token by token, with JAX in float64.

    Without `stabilize_correctly` the denominator and `m` are held constant.

    Args:
        arguments: Arguments over `T` tokens.
        reset: Bool `(..., T)`, True where the state is dropped before the token.
        cotangents: Cotangents of `h` and of the last state.
        stabilize_correctly: Whether the normalizer is bounded by `exp(-m)` instead of 1.

    Returns:
        The gradients of the arguments.
    """
    with jax.enable_x64(True):
        to_float64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
        arguments, cotangents = jax.tree.map(to_float64, (arguments, cotangents))
        grads = _gradients(arguments, reset, cotangents, stabilize_correctly)
        return jax.tree.map(np.asarray, grads)


@functools.partial(jax.jit, static_argnames="stabilize_correctly")
def _gradients(arguments, reset, cotangents, stabilize_correctly):
    jnp = jax.numpy

    def run(arguments):
        leading = reset.ndim - 1
        first = lambda x: jnp.moveaxis(x, leading, 0)  # noqa: E731
        *tokens, C, n, m = arguments
        if not stabilize_correctly:
            m = lax.stop_gradient(m)
        last, (h, _) = lax.scan(
            lambda state, xs: _step(jnp, lax.stop_gradient, stabilize_correctly, state, *xs),
            (C, n, m),
            (jax.tree.map(first, tokens), first(reset)),
        )
        return jnp.moveaxis(h, 0, leading), last

    return jax.vjp(run, arguments)[1](cotangents)[0]


def in_parts(cell: Callable, num_parts: int) -> Callable:
    """Shards the tokens of a function under test, in contiguous parts.

    Args:
        cell: Function `cell(arguments, reset) -> (h, (C, n, m))`, with two leading axes and the
            context axis `cp`.
        num_parts: Number of devices, one for each part.

    Returns:
        The same function of whole sequences.
    """
    tokens, states = PartitionSpec(None, None, "cp"), PartitionSpec()
    specs = Arguments(*[tokens] * 5, *[states] * 3)
    return jax.shard_map(
        cell,
        mesh=Mesh(jax.devices()[:num_parts], "cp"),
        in_specs=(specs, tokens),
        out_specs=(tokens, states),
        check_vma=False,
    )


def outputs_and_gradients(cell: Callable, arguments: Arguments, reset, cotangents):
    """Runs and differentiates a function under test.

    Args:
        cell: Function `cell(arguments, reset) -> (h, (C, n, m))`. Programs of the same function
            are compiled once for each set of shapes.
        arguments: Arguments with respect to which it is differentiated.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        cotangents: Cotangents of the outputs.

    Returns:
        The outputs, and the gradients of the arguments.
    """
    return _with_gradients(cell)(arguments, reset, cotangents)


@functools.cache
def _with_gradients(cell: Callable) -> Callable:
    def run(arguments, reset, cotangents):
        def as_tuples(arguments):
            h, state = cell(arguments, reset)
            return h, tuple(state)

        outputs, vjp = jax.vjp(as_tuples, arguments)
        return outputs, vjp(cotangents)[0]

    return jax.jit(run)


def relative_error(actual, expected, floor: float = 0.0) -> float:
    """Returns the norm of the error, divided by the norm of the expected array plus `floor`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) + floor))


class _Case(NamedTuple):
    """Distribution of the gates; centers of forget gates are drawn from `forget_centers`."""

    forget_centers: tuple[float, ...] = (3.0,)
    forget_scale: float = 1.0
    input_bias: float = 0.0
    input_range: float = 0.0  # If not 0, input gates are uniform within +- this.
    with_state: bool = True  # If False, the state is zero, and only `h` has a cotangent.


CASES = {
    "ordinary": _Case(),
    "ordinary, no state": _Case(with_state=False),
    "input bias -10": _Case(input_bias=-10.0),
    "input bias -10, no state": _Case(input_bias=-10.0, with_state=False),
    "input bias +10": _Case(input_bias=10.0),
    "forget +40": _Case((40.0,), 0.0),
    "forget +40 and noise": _Case((40.0,)),
    "forget -40": _Case((-40.0,), 0.0),
    "forget -40 and noise": _Case((-40.0,)),
    "forget +-40": _Case((-40.0, 40.0), 0.0),
    "forget +-40 and noise": _Case((-40.0, 40.0)),
    "input up to 80": _Case(input_range=80.0),
    "input up to 80, forget +-40": _Case((-40.0, 40.0), input_range=80.0),
}


class Problem(NamedTuple):
    """Sequences of all `CASES` in one batch, with the expected outputs and gradients.

    Attributes:
        arguments: Arguments with leading axes `(len(CASES), 2)`.
        reset: Bool `(..., T)`, True where the state is dropped before the token.
        cotangents: Cotangents of `(h, (C, n, m))`.
        outputs: Expected `(h, (C, n, m))`, in float64.
        gradients: Expected gradients of the arguments, in float64.
        is_well_conditioned: Tokens whose output is compared and has a cotangent, bool `(..., T)`.
    """

    arguments: Arguments
    reset: np.ndarray
    cotangents: Any
    outputs: Any
    gradients: Arguments
    is_well_conditioned: np.ndarray


@functools.cache
def problem(time: int, *, with_reset: bool, stabilize_correctly: bool = True) -> Problem:
    """Creates the problem over `time` tokens, with or without random resets."""
    sequences = []
    for seed, case in enumerate(CASES.values()):
        rng = np.random.default_rng(seed)
        arguments = random_arguments(seed, (2,), time, qk_dim=8, with_state=case.with_state)
        forget = rng.choice(case.forget_centers, (2, time))
        forget += case.forget_scale * rng.standard_normal((2, time))
        inputs = arguments.i + case.input_bias
        if case.input_range:
            inputs = rng.uniform(-case.input_range, case.input_range, (2, time))
        arguments = arguments._replace(i=np.float32(inputs), f=np.float32(forget))
        reset = rng.random((2, time)) < 0.15
        reset[:, time // 2] = True
        dh, d_state = random_cotangents(seed + 100, arguments)
        d_state = jax.tree.map(lambda x, scale=case.with_state: x * np.float32(scale), d_state)
        sequences.append((arguments, reset & with_reset, dh, d_state))
    arguments, reset, dh, d_state = jax.tree.map(lambda *xs: np.stack(xs), *sequences)
    options = {"stabilize_correctly": stabilize_correctly}
    h, state, is_well_conditioned = oracle(arguments, reset, **options)
    cotangents = dh * is_well_conditioned[..., None], d_state
    gradients = oracle_gradients(arguments, reset, cotangents, **options)
    return Problem(arguments, reset, cotangents, (h, state), gradients, is_well_conditioned)


def assert_solves(problem: Problem, outputs, gradients: Arguments) -> None:
    """Asserts that outputs and gradients are as expected, case by case.

    Args:
        problem: Problem with the expected values.
        outputs: `(h, (C, n, m))`.
        gradients: Gradients of the arguments.
    """
    wrong = []
    for at, name in enumerate(CASES):
        mask = problem.is_well_conditioned[at]
        h, *state = (np.asarray(x[at]) for x in jax.tree.leaves(outputs))
        true_h, *true_state = (x[at] for x in jax.tree.leaves(problem.outputs))
        for key, x, y in zip("hCnm", (h[mask], *state), (true_h[mask], *true_state), strict=True):
            if not (error := relative_error(x, y)) < 3e-5:
                wrong.append(f"{name}: {key} is off by {error:.1e}")
        # Some gradients are nearly zero, so errors are relative to the largest gradient as well.
        largest = max(np.linalg.norm(y[at]) for y in problem.gradients)
        for key, x, y in zip(Arguments._fields, gradients, problem.gradients, strict=True):
            error = relative_error(x[at], y[at], 1e-2 * largest)
            if not error < 3e-4:
                wrong.append(f"{name}: the gradient of {key} is off by {error:.1e}")
    if wrong:
        raise AssertionError("\n".join(wrong))
