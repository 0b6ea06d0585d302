"""The mLSTM layer: projections and gates around the cell."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.models.shared.dense import Dense
from xlstm.models.shared.init import small_init, wang_init
from xlstm.models.shared.norm import MultiHeadLayerNorm
from xlstm.models.shared.soft_cap import soft_cap
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import MLSTMState
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


def _forget_bias_init(rng, shape, dtype):
    """Spreads the heads' initial memory spans: 3 to 6."""
    del rng
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)


class mLSTMLayer(nn.Module):
    """Multi-head mLSTM with a sigmoid output gate.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM 7B", 2025 (arXiv 2503.13427), section 3.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, reset: jax.Array | None, state: MLSTMState | None
    ) -> tuple[jax.Array, MLSTMState | None]:
        """Runs the layer.

        Args:
            x: `(B, T, D)`.
            reset: Where the state is dropped before the token, bool `(B, T)`, or None.
            state: State before the first token, leading axes `(B, NH)`, or None for zero.

        Returns:
            The output `(B, T, D)`, and the last state if `state` was given, else None.
        """
        config = self.config.model
        dtype = config.compute_dtype
        batch, time, embedding_dim = x.shape

        def project(name: str, features: int) -> jax.Array:
            init_fn = small_init(embedding_dim)
            return Dense(features, init_fn, (None, "tp"), dtype=dtype, name=name)(x)

        def gate(name: str, bias_init) -> jax.Array:
            # Initially the gates do not depend on the input.
            preact = Dense(
                config.num_heads, nn.initializers.zeros, (None, "tp"), bias_init, dtype, name=name
            )(x)
            return soft_cap(preact.astype(jnp.float32), config.gate_soft_cap).swapaxes(1, 2)

        def split_heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, time, config.num_heads, -1).swapaxes(1, 2)

        q = split_heads(project("q", config.qk_dim))
        k = split_heads(project("k", config.qk_dim))
        v = split_heads(project("v", config.v_dim))
        output_gate = nn.sigmoid(project("ogate_preact", config.v_dim))
        i = gate("igate_preact", nn.initializers.constant(config.igate_bias_init))
        f = gate("fgate_preact", _forget_bias_init)

        h = create_backend(self.config.backend, config)(
            q,
            k,
            v,
            i,
            f,
            *(state or ()),
            return_last_states=state is not None,
            reset=None if reset is None else reset[:, None, :],
        )
        h, state = h if state is not None else (h, None)
        h = MultiHeadLayerNorm(config.norm_eps, dtype, name="multihead_norm")(h)
        out_init = wang_init(embedding_dim, config.num_blocks)
        out_proj = Dense(embedding_dim, out_init, ("tp", None), dtype=dtype, name="out_proj")
        return out_proj(output_gate * h), state
