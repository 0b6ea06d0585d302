"""What all mLSTM backends share: their interface, their shapes, the gates and the zero state."""

from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLSTMState(NamedTuple):
    """State of the mLSTM after a token, per sequence and head, at least float32.

    Attributes:
        C: Matrix memory `(..., DHQK, DHV)`.
        n: Normalizer `(..., DHQK)`.
        m: Log scale `(...)`: `C` and `n` are stored divided by `exp(m)`.
    """

    C: jax.Array
    n: jax.Array
    m: jax.Array


class MLSTMInputs(NamedTuple):
    """Inputs of a backend, checked and in one form.

    Attributes:
        q: Queries `(..., T, DHQK)`, divided by `sqrt(DHQK)`.
        k: Keys `(..., T, DHQK)`.
        v: Values `(..., T, DHV)`.
        i: Input gate pre-activations `(..., T)`, at least float32.
        log_f: Log forget gates `(..., T)`, at least float32.
        reset: Where the state is dropped before the token, bool `(..., T)`, or None.
        state: The state before the first token.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    i: jax.Array
    log_f: jax.Array
    reset: jax.Array | None
    state: MLSTMState


class mLSTMBackendConfig:
    """What the configurations of all backends share."""

    def assign_model_config_params(self, model_config: Any) -> Self:
        """Returns the configuration adapted to a model: itself, unless a backend needs more."""
        del model_config
        return self


class mLSTMBackend(nn.Module):
    """Interface of an mLSTM backend: the cell applied to a whole sequence.

    Attributes:
        config: The backend's configuration, an instance of `config_class`.
    """

    config: mLSTMBackendConfig
    config_class = mLSTMBackendConfig

    @property
    def can_vmap_over_heads(self) -> bool:
        """Whether the backend may be vmapped over the axis of the heads."""
        return True

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        i: jax.Array,
        f: jax.Array,
        c_initial: jax.Array | None = None,
        n_initial: jax.Array | None = None,
        m_initial: jax.Array | None = None,
        return_last_states: bool = False,
        reset: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, MLSTMState]:
        """Runs the cell over a sequence.

        Args:
            q: Queries `(..., T, DHQK)`.
            k: Keys `(..., T, DHQK)`.
            v: Values `(..., T, DHV)`.
            i: Input gate pre-activations `(..., T)` or `(..., T, 1)`.
            f: Forget gate pre-activations `(..., T)` or `(..., T, 1)`.
            c_initial: Matrix memory before the first token `(..., DHQK, DHV)`; None for zero.
            n_initial: Normalizer `(..., DHQK)`; None for zero.
            m_initial: Log scale `(...)`; None for zero.
            return_last_states: Whether to return the state after the last token too.
            reset: Bool, broadcasts to `(..., T)`: True drops the state before that token.

        Returns:
            `h (..., T, DHV)` in the type of `v`, or `(h, MLSTMState)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        inputs = prepare_inputs(q, k, v, i, f, c_initial, n_initial, m_initial, reset)
        h, state = self.run(inputs)
        return (h, state) if return_last_states else h

    def run(self, inputs: MLSTMInputs) -> tuple[jax.Array, MLSTMState]:
        """Runs the cell over prepared inputs; returns `h (..., T, DHV)` and the last state."""
        raise NotImplementedError


def zero_state(leading: tuple[int, ...], qk_dim: int, v_dim: int, dtype=jnp.float32) -> MLSTMState:
    """The state before a document.

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


def _check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has the shape {x.shape}, expected {expected}")


def prepare_inputs(q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, reset=None):
    """Checks a backend's inputs and brings them into one form.

    Args are those of `mLSTMBackend.__call__`.

    Returns:
        The inputs as `MLSTMInputs`. Gates and states have the type that float32 and `q`'s type
        promote to, so they are never less than float32.

    Raises:
        ValueError: If the shapes do not fit, or only a part of the initial state is given.
    """
    if q.ndim < 2 or q.shape[-2] < 1:
        raise ValueError(f"q has the shape {q.shape}, expected (..., T, DHQK) with T >= 1")
    *leading, time, qk_dim = q.shape
    leading = tuple(leading)
    _check_shape("k", k, q.shape)
    _check_shape("v", v, (*leading, time, v.shape[-1] if v.ndim else 0))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    gates = {}
    for name, gate in (("i", i), ("f", f)):
        gate = gate[..., 0] if gate.shape == (*leading, time, 1) else gate
        _check_shape(name, gate, (*leading, time))
        gates[name] = gate.astype(dtype)
    if reset is not None:
        try:
            reset = jnp.broadcast_to(reset, (*leading, time))
        except ValueError:
            raise ValueError(
                f"reset has the shape {reset.shape}, which does not broadcast to {(*leading, time)}"
            ) from None
    given = [x is not None for x in (c_initial, n_initial, m_initial)]
    if all(given):
        state = MLSTMState(c_initial, n_initial, m_initial)
        for name, x, shape in zip(
            ("initial_C", "initial_n", "initial_m"),
            state,
            ((*leading, qk_dim, v.shape[-1]), (*leading, qk_dim), leading),
            strict=True,
        ):
            _check_shape(name, x, shape)
        state = jax.tree.map(lambda x: x.astype(dtype), state)
    elif any(given):
        raise ValueError("an initial state needs all of C, n and m; only a part of them was given")
    else:
        state = zero_state(leading, qk_dim, v.shape[-1], dtype)
    log_f = jax.nn.log_sigmoid(gates["f"])
    return MLSTMInputs(q * qk_dim**-0.5, k, v, gates["i"], log_f, reset, state)


def divide_by_normalizer(
    numerator: jax.Array, qn: jax.Array, m: jax.Array, stabilize_correctly: bool
) -> jax.Array:
    """The cell's output from its stabilised numerator and normalizer.

    Args:
        numerator: `C_t^T q_t`, `(..., DHV)`.
        qn: `n_t . q_t`, `(...)`.
        m: Log scale `(...)`.
        stabilize_correctly: Whether the bound of the normalizer is `exp(-m)`, which makes the
            output independent of `m`, or 1. With 1 the denominator and `m` are constants for the
            gradient, which is exact behind a scale-invariant norm.

    Returns:
        `h (..., DHV)`.
    """
    bound = jnp.exp(-m) if stabilize_correctly else jnp.ones_like(m)
    denominator = jnp.maximum(jnp.abs(qn), bound)
    if not stabilize_correctly:
        denominator = jax.lax.stop_gradient(denominator)
    return numerator / denominator[..., None]
