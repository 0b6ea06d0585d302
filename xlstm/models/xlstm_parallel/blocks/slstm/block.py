"""The residual block with an sLSTM layer."""

import flax.linen as nn

from xlstm.models.shared.dropout import dropout
from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import LayerNorm
from xlstm.models.xlstm_parallel.blocks.slstm.layer import sLSTMLayer
from xlstm.models.xlstm_parallel.blocks.stream import BlockPlace, Stream
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class sLSTMBlock(nn.Module):
    """Post up-projection: `x + slstm_layer(norm_slstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figure 10.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        dtype, x = config.compute_dtype, stream.x
        normed = LayerNorm(config.norm_eps, dtype, name="norm_slstm")(x)
        layer = sLSTMLayer(self.config, name="slstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        # Site 0 is the embedding; every block has two.
        x = x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        normed = LayerNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        ffn = GatedFeedForward(
            config.slstm_ffn_dim,
            config.num_blocks,
            dtype,
            self.config.mesh.tp_overlap,
            nn.gelu,
            config.precision,
            name="ffn",
        )
        x = x + dropout(ffn(normed), config.dropout, stream.dropout_keys, 2 * place.number + 2)
        return stream.after(place, x, state), None
