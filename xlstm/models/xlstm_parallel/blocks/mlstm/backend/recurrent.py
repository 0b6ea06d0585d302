"""The mLSTM step by step: the definition, and the form that decoding uses."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    MLSTMInputs,
    MLSTMState,
    divide_by_normalizer,
    mLSTMBackend,
    mLSTMBackendConfig,
)


@dataclasses.dataclass(frozen=True)
class mLSTMBackendRecurrentConfig(mLSTMBackendConfig):
    """Options of the `recurrent` backend."""

    stabilize_correctly: bool = False  # Bound the normalizer by exp(-m) instead of 1.


def mlstm_step(
    state: MLSTMState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    log_f: jax.Array,
    *,
    stabilize_correctly: bool,
) -> tuple[MLSTMState, jax.Array]:
    """One token of the mLSTM.

    Args:
        state: State before the token.
        q: Query `(..., DHQK)`, divided by `sqrt(DHQK)`.
        k: Key `(..., DHQK)`.
        v: Value `(..., DHV)`.
        i: Input gate pre-activation `(...)`.
        log_f: Log forget gate `(...)`.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        The state after the token, and `h (..., DHV)`.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), eq. 19 to 27.
    """
    m = jnp.maximum(log_f + state.m, i)
    if not stabilize_correctly:
        m = lax.stop_gradient(m)
    keep = jnp.exp(log_f + state.m - m)
    write = jnp.exp(i - m)
    k = k.astype(state.n.dtype)
    C = keep[..., None, None] * state.C + (write[..., None] * k)[..., None] * v[..., None, :]
    n = keep[..., None] * state.n + write[..., None] * k
    numerator = jnp.einsum("...k,...kv->...v", q, C)
    h = divide_by_normalizer(numerator, jnp.sum(n * q, axis=-1), m, stabilize_correctly)
    return MLSTMState(C, n, m), h.astype(v.dtype)


def mlstm_recurrent(
    inputs: MLSTMInputs, *, stabilize_correctly: bool
) -> tuple[jax.Array, MLSTMState]:
    """Runs the cell over a sequence, one token after the other.

    Args:
        inputs: Prepared inputs over `T` tokens.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        `h (..., T, DHV)` and the last state.
    """
    q, k, v, i, log_f, reset, state = inputs
    if not stabilize_correctly:
        state = state._replace(m=lax.stop_gradient(state.m))
    tokens = [jnp.moveaxis(x, -2, 0) for x in (q, k, v)]
    tokens += [jnp.moveaxis(x, -1, 0) for x in (i, log_f)]
    resets = None if reset is None else jnp.moveaxis(reset, -1, 0)

    def body(state, xs):
        reset, token = xs
        if reset is not None:
            state = jax.tree.map(
                lambda x: jnp.where(
                    reset.reshape(reset.shape + (1,) * (x.ndim - reset.ndim)), 0, x
                ),
                state,
            )
        return mlstm_step(state, *token, stabilize_correctly=stabilize_correctly)

    state, h = lax.scan(body, state, (resets, tokens))
    return jnp.moveaxis(h, 0, -2), state


class mLSTMBackendRecurrent(mLSTMBackend):
    """Backend `recurrent`: linear in `T`, a token at a time, differentiable by JAX itself."""

    config: mLSTMBackendRecurrentConfig
    config_class = mLSTMBackendRecurrentConfig

    def run(self, inputs):
        """See `mLSTMBackend.run`."""
        return mlstm_recurrent(inputs, stabilize_correctly=self.config.stabilize_correctly)
