"""The mLSTM in its recurrent form: the definition of the cell, and a decoding step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.precision import product_precision
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    mLSTMBackend,
    mLSTMBackendConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMInputs,
    MLSTMState,
    run_prepared,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import divide_by_normalizer


@dataclasses.dataclass(frozen=True)
class mLSTMBackendRecurrentConfig(mLSTMBackendConfig):
    """Options of the `recurrent` backend."""

    stabilize_correctly: bool  # Bound the normalizer by exp(-m) instead of 1.


def mlstm_step(
    state: MLSTMState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    log_f: jax.Array,
    *,
    stabilize_correctly: bool,
    precision: lax.Precision | None = None,
) -> tuple[MLSTMState, jax.Array]:
    """Runs the cell on one token.

    The gradient treats the scale `exp(m)` of `C` and `n` as constant; `h` does not depend on it.

    Args:
        state: State before the token.
        q: Query `(..., DHQK)`, divided by `sqrt(DHQK)`.
        k: Key `(..., DHQK)`.
        v: Value `(..., DHV)`.
        i: Input gate pre-activation `(...)`.
        log_f: Log forget gate `(...)`.
        stabilize_correctly: See `divide_by_normalizer`.
        precision: Precision of float32 products, see `product_precision`.

    Returns:
        The state after the token, and `h (..., DHV)`.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), eq. 19 to 27.
    """
    m = jnp.maximum(log_f + state.m, i)
    scale, scale_before = lax.stop_gradient((m, state.m))
    keep = jnp.exp(log_f + scale_before - scale)
    write = jnp.exp(i - scale)
    k = k.astype(state.n.dtype)
    C = keep[..., None, None] * state.C + (write[..., None] * k)[..., None] * v[..., None, :]
    n = keep[..., None] * state.n + write[..., None] * k
    numerator = jnp.einsum("...k,...kv->...v", q, C, precision=product_precision(precision, q, C))
    h = divide_by_normalizer(numerator, jnp.sum(n * q, axis=-1), m, stabilize_correctly)
    return MLSTMState(C, n, m), h.astype(v.dtype)


def _rescale(state: MLSTMState, log_factor: jax.Array) -> MLSTMState:
    factor = jnp.exp(log_factor)
    return MLSTMState(factor[..., None, None] * state.C, factor[..., None] * state.n, state.m)


def mlstm_recurrent(
    inputs: MLSTMInputs,
    reset: jax.Array | None,
    *,
    stabilize_correctly: bool,
    precision: lax.Precision | None = None,
) -> tuple[jax.Array, MLSTMState]:
    """Runs the cell over a sequence, token by token.

    Args:
        inputs: Prepared inputs over `T` tokens.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        stabilize_correctly: See `divide_by_normalizer`.
        precision: See `mlstm_step`.

    Returns:
        `h (..., T, DHV)` and the last state.
    """
    q, k, v, i, log_f, state = inputs
    if stabilize_correctly:  # From the true scale to a constant one, by a factor of 1.
        state = _rescale(state, state.m - lax.stop_gradient(state.m))
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
        return mlstm_step(
            state, *token, stabilize_correctly=stabilize_correctly, precision=precision
        )

    state, h = lax.scan(body, state, (resets, tokens))
    if stabilize_correctly:  # And back.
        state = _rescale(state, lax.stop_gradient(state.m) - state.m)
    else:
        state = state._replace(m=lax.stop_gradient(state.m))
    return jnp.moveaxis(h, 0, -2), state


class mLSTMBackendRecurrent(mLSTMBackend):
    """Backend `recurrent`: token by token, linear in `T`, differentiated by JAX."""

    config: mLSTMBackendRecurrentConfig
    config_class = mLSTMBackendRecurrentConfig

    def run(self, arguments, reset, return_last_states):
        """See `mLSTMBackend.run`."""
        cell = functools.partial(
            mlstm_recurrent,
            stabilize_correctly=self.config.stabilize_correctly,
            precision=self.precision,
        )
        return run_prepared(cell, arguments, reset, return_last_states)
