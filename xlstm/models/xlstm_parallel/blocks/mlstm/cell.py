"""What all mLSTM layers do around the cell: heads, gates, their statistics, padding, the norm."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.models.shared.norm import MultiHeadLayerNorm
from xlstm.models.shared.soft_cap import soft_cap
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    MLSTMState,
    neutral_gates,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.models.xlstm_parallel.blocks.moments import sow_gate_moments
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


def forget_bias_init(rng, shape, dtype):
    """Spreads the heads' initial memory spans: 3 to 6."""
    del rng
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)


class CellInputs(NamedTuple):
    """What a layer computes for the cell of this device's heads.

    Attributes:
        q: Queries `(B, T, NH * DHQK)`.
        k: Keys `(B, T, NH * DHQK)`.
        v: Values `(B, T, NH * DHV)`.
        igate: Input gate pre-activations `(B, T, NH)`.
        fgate: Forget gate pre-activations `(B, T, NH)`.
        ogate: What the layer multiplies by afterwards, `(B, T, NH * DHV)`; here for statistics.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    igate: jax.Array
    fgate: jax.Array
    ogate: jax.Array


def run_cell(
    layer: nn.Module,
    config: LanguageModelConfig,
    inputs: CellInputs,
    reset: jax.Array | None,
    padding: jax.Array | None,
    state: MLSTMState | None,
) -> tuple[jax.Array, MLSTMState | None]:
    """Runs the configured backend, and normalizes each head, for a layer in its compact method.

    The layer gets the parameters `multihead_norm`, and sows `gate_moments`, see `sow_gate_moments`:
    of the soft-capped pre-activations `igate` and `fgate`, and of `ogate`.

    Args:
        layer: The layer.
        config: Configuration of the model.
        inputs: What the layer has computed.
        reset: Where the state is dropped before the token, bool `(B, T)`, or None.
        padding: Which tokens leave no trace in the state, bool `(B, T)`, or None.
        state: State before the first token, leading axes `(B, NH)`, or None for zero.

    Returns:
        The normalized output `(B, T, NH * DHV)`, and the last state if `state` was given, else
        None.
    """
    model, num_heads = config.model, inputs.igate.shape[-1]

    def split_heads(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], num_heads, -1).swapaxes(1, 2)

    def cap(y: jax.Array) -> jax.Array:
        return soft_cap(y.astype(jnp.float32), model.gate_soft_cap).swapaxes(1, 2)

    q, k, v = (split_heads(y) for y in (inputs.q, inputs.k, inputs.v))
    igate, fgate = cap(inputs.igate), cap(inputs.fgate)
    if padding is not None:
        igate, fgate = neutral_gates(igate, fgate, padding[:, None, :])
    h = create_backend(config.backend, model)(
        *(q, k, v, igate, fgate, *(state or ())),
        return_last_states=state is not None,
        reset=None if reset is None else reset[:, None, :],
    )
    h, state = h if state is not None else (h, None)
    h = MultiHeadLayerNorm(model.norm_eps, model.compute_dtype, name="multihead_norm")(h)
    sow_gate_moments(layer, igate, fgate, inputs.ogate)
    return h, state
