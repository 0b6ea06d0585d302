"""The residual block of xLSTM-7B: an mLSTM layer, then a gated feed-forward layer."""

import flax.linen as nn
import jax

from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import RMSNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import MLSTMState
from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMLayer
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class mLSTMBlock(nn.Module):
    """`x + mlstm_layer(norm_mlstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, reset: jax.Array | None, state: MLSTMState | None
    ) -> tuple[jax.Array, MLSTMState | None]:
        """Runs the block; arguments and returned values are those of `mLSTMLayer`."""
        config = self.config.model
        dtype = config.compute_dtype
        normed = RMSNorm(config.norm_eps, dtype, name="norm_mlstm")(x)
        y, state = mLSTMLayer(self.config, name="mlstm_layer")(normed, reset, state)
        x = x + y
        normed = RMSNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        ffn = GatedFeedForward(config.ffn_dim, config.num_blocks, dtype, name="ffn")
        return x + ffn(normed), state
