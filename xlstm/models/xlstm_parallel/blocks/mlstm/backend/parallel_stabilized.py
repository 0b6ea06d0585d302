"""The mLSTM in its parallel form: all pairs of tokens at once, quadratic in `T`, easy to read."""

import dataclasses

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
class mLSTMBackendParallelStabilizedConfig(mLSTMBackendConfig):
    """Options of the `parallel_stabilized` backend."""

    stabilize_correctly: bool = False  # Bound the normalizer by exp(-m) instead of 1.


def mlstm_parallel_stabilized(inputs: MLSTMInputs, *, stabilize_correctly: bool):
    """Runs the cell over a sequence by weighing every pair of a token and an earlier one.

    With `b` the cumulative log forget gate, token `s` reaches token `t` with the log weight
    `D_ts = b_t - b_s + i_s`, the initial state with `b_t + m_0`; `m_t` is their maximum.

    Args:
        inputs: Prepared inputs over `T` tokens.
        stabilize_correctly: See `divide_by_normalizer`.

    Returns:
        `h (..., T, DHV)` and the last state.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), appendix A.3.
    """
    q, k, v, i, log_f, reset, state = inputs
    if not stabilize_correctly:
        state = state._replace(m=lax.stop_gradient(state.m))
    dtype = i.dtype
    time = i.shape[-1]
    b = jnp.cumsum(log_f, axis=-1)
    reaches = jnp.tril(jnp.ones((time, time), bool))
    # The log weight of the state that stands before the token's document: the initial state, or,
    # after a reset, the zero state, whose m = 0 still bounds the log scale from below.
    log_carry = b + state.m[..., None]
    carries = jnp.ones(b.shape, bool)
    if reset is not None:
        document = jnp.cumsum(reset, axis=-1)
        reaches = reaches & (document[..., :, None] == document[..., None, :])
        carries = document == 0
        start = lax.cummax(jnp.where(reset, jnp.arange(time), 0), axis=b.ndim - 1)
        before_start = jnp.take_along_axis(b - log_f, start, axis=-1)
        log_carry = jnp.where(carries, log_carry, b - before_start)
    log_weight = b[..., :, None] - b[..., None, :] + i[..., None, :]
    log_weight = jnp.where(reaches, log_weight, -jnp.inf)
    m = jnp.maximum(jnp.max(log_weight, axis=-1), log_carry)
    if not stabilize_correctly:
        m = lax.stop_gradient(m)
    weight = jnp.exp(log_weight - m[..., None])
    carry = jnp.exp(jnp.where(carries, log_carry - m, -jnp.inf))

    scores = jnp.einsum("...tk,...sk->...ts", q, k).astype(dtype) * weight
    numerator = jnp.einsum("...ts,...sv->...tv", scores, v)
    numerator += carry[..., None] * jnp.einsum("...tk,...kv->...tv", q, state.C)
    qn = jnp.sum(scores, axis=-1) + carry * jnp.einsum("...tk,...k->...t", q, state.n)
    h = divide_by_normalizer(numerator, qn, m, stabilize_correctly).astype(v.dtype)

    last_weight, last_carry = weight[..., -1, :], carry[..., -1]
    last = MLSTMState(
        C=last_carry[..., None, None] * state.C
        + jnp.einsum("...s,...sk,...sv->...kv", last_weight, k, v),
        n=last_carry[..., None] * state.n + jnp.einsum("...s,...sk->...k", last_weight, k),
        m=m[..., -1],
    )
    return h, last


class mLSTMBackendParallelStabilized(mLSTMBackend):
    """Backend `parallel_stabilized`: the readable oracle."""

    config: mLSTMBackendParallelStabilizedConfig
    config_class = mLSTMBackendParallelStabilizedConfig

    def run(self, inputs):
        """See `mLSTMBackend.run`."""
        return mlstm_parallel_stabilized(
            inputs, stabilize_correctly=self.config.stabilize_correctly
        )
