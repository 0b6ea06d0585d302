"""The sLSTM layer: a convolution and gates in front of the cell.

The cell reads one token after the other, so no device can begin with a later part of a sequence:
devices that share the tokens exchange them for heads, over both `TOKEN_AXES`.
`xlstm.common_types` describes the arguments `(x, reset, padding, state)`.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlstm.distributed.mesh import TOKEN_AXES
from xlstm.distributed.tensor_parallel import (
    features_to_tokens,
    gather_tokens,
    tokens_to_features,
)
from xlstm.models.shared.convolution import CausalConvolution, ConvolutionalState
from xlstm.models.shared.linear import BlockDiagonal, boxed_parameter
from xlstm.models.shared.moments import sow_gate_moments
from xlstm.models.shared.norm import MultiHeadLayerNorm
from xlstm.models.xlstm_parallel.blocks.slstm.cell import RESIDUALS, gate_preactivations, slstm
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class sLSTMLayer(nn.Module):
    """sLSTM layer: input and forget gates are computed from `silu(conv(x))`, the others from `x`.

    Each head depends on its own channels alone, also of the input: devices exchange tokens for
    channels, and need no sum. The layer sows `gate_moments`, see `sow_gate_moments`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figure 10.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        reset: jax.Array | None = None,
        padding: jax.Array | None = None,
        state: ConvolutionalState | None = None,
    ) -> tuple[jax.Array, ConvolutionalState | None]:
        """Runs the layer on local tokens, heads and channels; the cell's state is `SLSTMState`."""
        config = self.config.model
        dtype, head_dim = config.compute_dtype, x.shape[-1] // config.num_heads
        cell_state, last_inputs = state or (None, None)
        x = tokens_to_features(x, TOKEN_AXES)
        if reset is not None:
            reset = checkpoint_name(gather_tokens(reset, "cp"), RESIDUALS)
        conv = CausalConvolution(config.conv_width, dtype, TOKEN_AXES, name="conv")
        c, last_inputs = conv(x, reset, padding, last_inputs)
        c = nn.silu(c)

        def gate(name: str, y: jax.Array, bias_init: Callable) -> jax.Array:
            layer = BlockDiagonal(
                head_dim, dtype, bias_init, config.precision, TOKEN_AXES, name=name
            )
            y = layer(y)
            return y.reshape(*y.shape[:2], -1, head_dim).swapaxes(1, 2)

        zeros = nn.initializers.zeros
        inputs = (
            gate("z_preact", x, zeros),
            gate("igate_preact", c, zeros),
            gate("fgate_preact", c, _forget_bias_init(head_dim)),
            gate("ogate_preact", x, zeros),
        )
        shape = (inputs[0].shape[1], head_dim, 4 * head_dim)
        axes = (TOKEN_AXES, None, None)
        init_fn = nn.initializers.normal(config.slstm_recurrent_scale / math.sqrt(head_dim))
        recurrent = boxed_parameter(self, "recurrent", init_fn, shape, axes)
        recurrent = recurrent.astype(dtype)
        h, last_state = slstm(
            *inputs,
            recurrent,
            cell_state,
            reset=reset,
            padding=padding,
            forget_gate=config.slstm_forget_gate,
            precision=config.precision,
        )
        if self.is_mutable_collection("intermediates"):
            _, i, f, o = gate_preactivations(
                inputs, recurrent, h, cell_state, reset, precision=config.precision
            )
            sow_gate_moments(self, i, f, nn.sigmoid(o))
        y = MultiHeadLayerNorm(config.norm_eps, dtype, TOKEN_AXES, name="multihead_norm")(h)
        y = features_to_tokens(y, TOKEN_AXES)
        return y, None if state is None else ConvolutionalState(last_state, last_inputs)


def _forget_bias_init(head_dim: int) -> Callable:
    """Returns an initializer of biases from 3 to 6, so that memory spans differ by channel."""

    def init(rng, shape, dtype):
        del rng
        return jnp.tile(jnp.linspace(3.0, 6.0, head_dim, dtype=dtype), shape[0] // head_dim)

    return init
