"""State, arguments and prepared inputs of the mLSTM backends.

`xlstm.common_types` describes the notation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm.distributed.mesh import match_varying_axes

# Gates are clipped to this magnitude, so that their sums over a sequence stay finite. Clipping does
# not change results: exp() of a difference of gates is 0, 1 or inf long before.
LARGEST_GATE = 1e29


class MLSTMState(NamedTuple):
    """State after a token, for each sequence and head; at least float32.

    Attributes:
        C: Matrix memory `(..., DHQK, DHV)`.
        n: Normalizer `(..., DHQK)`.
        m: Log scale `(...)`: `C` and `n` are stored divided by `exp(m)`.
    """

    C: jax.Array
    n: jax.Array
    m: jax.Array


def state_product(a: MLSTMState, b: MLSTMState) -> jax.Array:
    """Returns `<a.C, b.C> + <a.n, b.n>`, over all but the leading axes."""
    return jnp.sum(a.C * b.C, axis=(-2, -1)) + jnp.sum(a.n * b.n, axis=-1)


class MLSTMArguments(NamedTuple):
    """Arguments of a backend, with respect to which it is differentiated.

    Attributes:
        q: Queries `(..., T, DHQK)`.
        k: Keys `(..., T, DHQK)`.
        v: Values `(..., T, DHV)`.
        i: Input gate pre-activations `(..., T)` or `(..., T, 1)`.
        f: Forget gate pre-activations `(..., T)` or `(..., T, 1)`.
        initial_C: Matrix memory before the first token `(..., DHQK, DHV)`; None for zero.
        initial_n: Normalizer `(..., DHQK)`; None for zero.
        initial_m: Log scale `(...)`; None for zero.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    i: jax.Array
    f: jax.Array
    initial_C: jax.Array | None = None
    initial_n: jax.Array | None = None
    initial_m: jax.Array | None = None


class MLSTMInputs(NamedTuple):
    """Arguments of a backend in one common form, returned by `prepare_inputs`.

    Attributes:
        q: Queries `(..., T, DHQK)`, divided by `sqrt(DHQK)`.
        k: Keys `(..., T, DHQK)`.
        v: Values `(..., T, DHV)`.
        i: Input gate pre-activations `(..., T)`, at least float32.
        log_f: Log forget gates `(..., T)`, at least float32.
        state: State before the first token.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    i: jax.Array
    log_f: jax.Array
    state: MLSTMState


def zero_state(leading: tuple[int, ...], qk_dim: int, v_dim: int, dtype=jnp.float32) -> MLSTMState:
    """Returns the state before a document.

    Args:
        leading: Leading axes of the state.
        qk_dim: `DHQK`.
        v_dim: `DHV`.
        dtype: Type of the arrays.

    Returns:
        The state with `C = 0`, `n = 0`, `m = 0`.
    """
    return MLSTMState(
        C=jnp.zeros((*leading, qk_dim, v_dim), dtype),
        n=jnp.zeros((*leading, qk_dim), dtype),
        m=jnp.zeros(leading, dtype),
    )


def neutral_gates(i: jax.Array, f: jax.Array, padding: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replaces the gates of padding, so that it does not change the state.

    Args:
        i: Input gate pre-activations `(..., T)`.
        f: Forget gate pre-activations `(..., T)`.
        padding: Which tokens are padding, bool, broadcasts to `(..., T)`.

    Returns:
        The pre-activations, with closed input gates and open forget gates for padding.
    """
    return jnp.where(padding, -LARGEST_GATE, i), jnp.where(padding, LARGEST_GATE, f)


def run_prepared(
    cell: Callable[[MLSTMInputs, jax.Array | None], tuple[jax.Array, MLSTMState]],
    arguments: MLSTMArguments,
    reset: jax.Array | None,
    return_last_states: bool,
) -> jax.Array | tuple[jax.Array, MLSTMState]:
    """Implements `mLSTMBackend.run` with a function of prepared inputs.

    Args:
        cell: Function of the inputs and `reset (..., T)`, or None, that returns `h (..., T, DHV)`
            and the last state.
        arguments: Arguments of the backend.
        reset: See `mLSTMBackend.__call__`.
        return_last_states: See `mLSTMBackend.__call__`.

    Returns:
        The output of `mLSTMBackend.__call__`.
    """
    inputs = prepare_inputs(arguments)
    h, state = cell(inputs, check_reset(reset, inputs.i.shape))
    h = h.astype(arguments.v.dtype)
    return (h, state) if return_last_states else h


def prepare_inputs(arguments: MLSTMArguments) -> MLSTMInputs:
    """Checks the arguments of a backend and converts them to one common form.

    `q`, `k` and `v` keep their types, except that float16 becomes float32, since its range is too
    small for the cell.

    Args:
        arguments: Arguments of the backend.

    Returns:
        The inputs. Gates and states have the type to which float32 and the type of `q` promote,
        which is at least float32.

    Raises:
        ValueError: If shapes or types are wrong, or the initial state is incomplete.
    """
    _check_types(arguments)
    q, k, v, i, f, *initial = arguments
    if q.ndim < 2 or q.shape[-2] < 1 or q.shape[-1] < 1:
        raise ValueError(f"q has the shape {q.shape}, expected (..., T, DHQK) with T >= 1")
    *leading, time, qk_dim = q.shape
    leading = tuple(leading)
    check_shape("k", k, q.shape)
    check_shape("v", v, (*leading, time, v.shape[-1] if v.ndim else 0))
    v_dim = v.shape[-1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    gates = []
    for name, gate in (("i", i), ("f", f)):
        gate = gate[..., 0] if gate.shape == (*leading, time, 1) else gate
        check_shape(name, gate, (*leading, time))
        gates.append(jnp.clip(gate.astype(dtype), -LARGEST_GATE, LARGEST_GATE))
    given = [x is not None for x in initial]
    if all(given):
        shapes = ((*leading, qk_dim, v_dim), (*leading, qk_dim), leading)
        for name, x, shape in zip(MLSTMArguments._fields[5:], initial, shapes, strict=True):
            check_shape(name, x, shape)
        state = MLSTMState(*(x.astype(dtype) for x in initial))
    elif any(given):
        raise ValueError("the initial state is incomplete: expected all of C, n and m, or none")
    else:
        state = zero_state(leading, qk_dim, v_dim, dtype)
    q, k, v = (x.astype(dtype if x.dtype == jnp.float16 else x.dtype) for x in (q, k, v))
    log_f = jax.nn.log_sigmoid(gates[1])
    return match_varying_axes(MLSTMInputs(q * qk_dim**-0.5, k, v, gates[0], log_f, state))


def check_reset(reset: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Checks `reset` and broadcasts it to the gates' shape.

    Args:
        reset: Bool, broadcasts to `shape`; or None.
        shape: Shape of the gates, `(..., T)`.

    Returns:
        `reset (..., T)`, or None.

    Raises:
        ValueError: If `reset` does not broadcast, or is not bool.
    """
    if reset is None:
        return None
    if reset.dtype != bool:
        raise ValueError(f"reset has the type {reset.dtype} (shape {reset.shape}), expected bool")
    try:
        return jnp.broadcast_to(reset, shape)
    except ValueError:
        raise ValueError(
            f"reset has the shape {reset.shape}, which does not broadcast to {shape}"
        ) from None


def check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    """Raises a `ValueError` that names the array if its shape is not the expected one."""
    if x.shape != expected:
        raise ValueError(f"{name} has the shape {x.shape}, expected {expected}")


def _check_types(arguments: MLSTMArguments) -> None:
    for name, x in arguments._asdict().items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} has the type {x.dtype} (shape {x.shape}), expected a floating-point type"
            )
