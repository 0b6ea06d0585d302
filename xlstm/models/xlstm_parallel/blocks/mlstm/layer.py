"""The mLSTM layer: projections and gates around the cell, heads divided over `tp`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.distributed.tensor_parallel import column_parallel, row_parallel
from xlstm.models.shared.dense import Dense
from xlstm.models.shared.init import small_init, wang_init
from xlstm.models.shared.norm import MultiHeadLayerNorm
from xlstm.models.shared.soft_cap import soft_cap
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    MLSTMState,
    neutral_gates,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.models.xlstm_parallel.blocks.mlstm.moments import moments_of
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


def _forget_bias_init(rng, shape, dtype):
    """Spreads the heads' initial memory spans: 3 to 6."""
    del rng
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)


class mLSTMLayer(nn.Module):
    """Multi-head mLSTM with a sigmoid output gate.

    Whoever makes the collection `intermediates` mutable finds in it, as `gate_moments`, the
    `Moments` of this device's gates over all tokens: of the soft-capped pre-activations `igate` and
    `fgate`, and of the open share `ogate`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM 7B", 2025 (arXiv 2503.13427), section 3.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        reset: jax.Array | None,
        padding: jax.Array | None,
        state: MLSTMState | None,
    ) -> tuple[jax.Array, MLSTMState | None]:
        """Runs the layer.

        Args:
            x: This device's tokens, `(B, T / tp, D)`.
            reset: Where the state is dropped before the token, bool `(B, T)`, or None.
            padding: Which tokens leave no trace in the state, bool `(B, T)`, or None.
            state: State of this device's heads before the first token, leading axes `(B, NH)`, or
                None for zero.

        Returns:
            The output `(B, T / tp, D)`, and the last state if `state` was given, else None.
        """
        config, overlap = self.config.model, self.config.mesh.tp_overlap
        dtype, embedding_dim = config.compute_dtype, x.shape[-1]

        def dense(name: str, features: int) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(features, init_fn, (None, "tp"), dtype=dtype, name=name)

        def gate(name: str, bias_init: Callable) -> Dense:
            # Initially the gates do not depend on the input.
            init_fn = nn.initializers.zeros
            return Dense(config.num_heads, init_fn, (None, "tp"), bias_init, dtype, name=name)

        layers = {
            "q": dense("q", config.qk_dim),
            "k": dense("k", config.qk_dim),
            "v": dense("v", config.v_dim),
            "o": dense("ogate_preact", config.v_dim),
            "i": gate("igate_preact", nn.initializers.constant(config.igate_bias_init)),
            "f": gate("fgate_preact", _forget_bias_init),
        }
        y = column_parallel(
            lambda x: {name: layer(x) for name, layer in layers.items()}, x, "tp", overlap=overlap
        )
        num_heads = y["i"].shape[-1]

        def split_heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], num_heads, -1).swapaxes(1, 2)

        def cap(y: jax.Array) -> jax.Array:
            return soft_cap(y.astype(jnp.float32), config.gate_soft_cap).swapaxes(1, 2)

        q, k, v = (split_heads(y[name]) for name in "qkv")
        igate, fgate = cap(y["i"]), cap(y["f"])
        if padding is not None:
            igate, fgate = neutral_gates(igate, fgate, padding[:, None, :])
        h = create_backend(self.config.backend, config)(
            *(q, k, v, igate, fgate, *(state or ())),
            return_last_states=state is not None,
            reset=None if reset is None else reset[:, None, :],
        )
        h, state = h if state is not None else (h, None)
        h = MultiHeadLayerNorm(config.norm_eps, dtype, name="multihead_norm")(h)
        out_init = wang_init(embedding_dim, config.num_blocks)
        out_proj = Dense(embedding_dim, out_init, ("tp", None), dtype=dtype, name="out_proj")
        ogate = nn.sigmoid(y["o"])
        if self.is_mutable_collection("intermediates"):
            gates = {"igate": igate, "fgate": fgate, "ogate": ogate}
            moments = {name: moments_of(gate) for name, gate in gates.items()}
            self.sow("intermediates", "gate_moments", moments)
        return row_parallel(out_proj, ogate * h, "tp", overlap=overlap), state
