"""Residual blocks with an mLSTM layer."""

import flax.linen as nn

from xlstm.models.shared.dropout import dropout
from xlstm.models.shared.feed_forward import GatedFeedForward
from xlstm.models.shared.norm import LayerNorm, RMSNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMLayer
from xlstm.models.xlstm_parallel.blocks.mlstm.pre_up_layer import mLSTMPreUpLayer
from xlstm.models.xlstm_parallel.blocks.stream import BlockPlace, Stream
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class mLSTMBlock(nn.Module):
    """The block of xLSTM-7B: `x + mlstm_layer(norm_mlstm(x))`, then `x + ffn(norm_ffn(x))`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block.

        Args:
            stream: What came from the block before.
            place: Which block this is.

        Returns:
            What goes to the next block, and None, as a scan wants it.
        """
        config = self.config.model
        dtype, x = config.compute_dtype, stream.x
        # Site 0 is the embedding; every block has two.
        normed = RMSNorm(config.norm_eps, dtype, name="norm_mlstm")(x)
        layer = mLSTMLayer(self.config, name="mlstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        x = x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        normed = RMSNorm(config.norm_eps, dtype, name="norm_ffn")(x)
        overlap = self.config.mesh.tp_overlap
        ffn = GatedFeedForward(
            config.ffn_dim,
            config.num_blocks,
            dtype,
            overlap,
            precision=config.precision,
            name="ffn",
        )
        x = x + dropout(ffn(normed), config.dropout, stream.dropout_keys, 2 * place.number + 2)
        return stream.after(place, x, state), None


class mLSTMPreUpBlock(nn.Module):
    """The mLSTM block of the 2024 paper: `x + mlstm_layer(norm_mlstm(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figures 3 and 11.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, stream: Stream, place: BlockPlace) -> tuple[Stream, None]:
        """Runs the block; see `mLSTMBlock`."""
        config = self.config.model
        normed = LayerNorm(config.norm_eps, config.compute_dtype, name="norm_mlstm")(stream.x)
        layer = mLSTMPreUpLayer(self.config, name="mlstm_layer")
        y, state = layer(normed, stream.reset, stream.padding, stream.state_of(place))
        x = stream.x + dropout(y, config.dropout, stream.dropout_keys, 2 * place.number + 1)
        return stream.after(place, x, state), None
