"""The mLSTM in its parallel form: all pairs of tokens at once, quadratic in `T`."""

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
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    documents,
    pair_log_weights,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMInputs,
    MLSTMState,
    run_prepared,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import divide_by_normalizer


@dataclasses.dataclass(frozen=True)
class mLSTMBackendParallelStabilizedConfig(mLSTMBackendConfig):
    """Options of the `parallel_stabilized` backend."""

    stabilize_correctly: bool  # Bound the normalizer by exp(-m) instead of 1.


def mlstm_parallel_stabilized(
    inputs: MLSTMInputs,
    reset: jax.Array | None,
    *,
    stabilize_correctly: bool,
    precision: lax.Precision | None = None,
) -> tuple[jax.Array, MLSTMState]:
    """Runs the cell over a sequence by weighting all pairs of a token and an earlier one.

    The log weight of token `s` in token `t` is `D_ts = F_ts + i_s`, where `F_ts` is the sum of the
    log forget gates over `(s, t]`. The log weight of the initial state is `b_t + m_0`, where `b` is
    the cumulative sum of the log forget gates. `m_t` is the maximum of all of them.

    Args:
        inputs: Prepared inputs over `T` tokens.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        stabilize_correctly: See `divide_by_normalizer`.
        precision: Precision of float32 products, see `product_precision`.

    Returns:
        `h (..., T, DHV)` and the last state.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), appendix A.3.
    """
    q, k, v, i, log_f, state = inputs
    if not stabilize_correctly:
        state = state._replace(m=lax.stop_gradient(state.m))
    # Log weight of the state before the token's document: the initial state, or, after a reset, the
    # zero state, whose m = 0 still bounds the log scale from below.
    log_carry = jnp.cumsum(log_f, axis=-1) + state.m[..., None]
    document, carries = None, jnp.ones(i.shape, bool)
    if reset is not None:
        document, floor = documents(log_f, reset)
        carries = document == 0
        log_carry = jnp.where(carries, log_carry, floor)
    log_weight = pair_log_weights(i, log_f, document)
    m = jnp.maximum(jnp.max(log_weight, axis=-1), log_carry)
    scale = lax.stop_gradient(m)  # `h` does not depend on it.
    weight = jnp.exp(log_weight - scale[..., None])
    carry = jnp.where(carries, jnp.exp(log_carry - scale), 0)

    def multiply(spec: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(spec, *operands, precision=product_precision(precision, *operands))

    scores = multiply("...tk,...sk->...ts", q, k).astype(i.dtype) * weight
    numerator = multiply("...ts,...sv->...tv", scores, v)
    numerator += carry[..., None] * multiply("...tk,...kv->...tv", q, state.C)
    qn = jnp.sum(scores, axis=-1) + carry * multiply("...tk,...k->...t", q, state.n)
    h = divide_by_normalizer(numerator, qn, m, stabilize_correctly)

    last_m = m[..., -1] if stabilize_correctly else scale[..., -1]
    rescale = jnp.exp(scale[..., -1] - last_m)  # The value 1, with the gradient of the true scale.
    last_weight = rescale[..., None] * weight[..., -1, :]
    last_carry = rescale * carry[..., -1]
    last = MLSTMState(
        C=last_carry[..., None, None] * state.C
        + multiply("...s,...sk,...sv->...kv", last_weight, k, v),
        n=last_carry[..., None] * state.n + multiply("...s,...sk->...k", last_weight, k),
        m=last_m,
    )
    return h, last


class mLSTMBackendParallelStabilized(mLSTMBackend):
    """Backend `parallel_stabilized`: quadratic in `T`, the readable reference."""

    config: mLSTMBackendParallelStabilizedConfig
    config_class = mLSTMBackendParallelStabilizedConfig

    def run(self, arguments, reset, return_last_states):
        """See `mLSTMBackend.run`."""
        cell = functools.partial(
            mlstm_parallel_stabilized,
            stabilize_correctly=self.config.stabilize_correctly,
            precision=self.precision,
        )
        return run_prepared(cell, arguments, reset, return_last_states)
