"""The mLSTM layers: projections, gates, the backend that computes the cell, and a head-wise norm.

`xlstm.common_types` describes the arguments `(x, reset, padding, state)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.tensor_parallel import column_parallel, row_parallel, scatter_features
from xlstm.models.shared.convolution import CausalConvolution, ConvolutionalState
from xlstm.models.shared.linear import (
    BlockDiagonal,
    Dense,
    boxed_parameter,
    small_init,
    soft_cap,
    wang_init,
)
from xlstm.models.shared.moments import sow_gate_moments
from xlstm.models.shared.norm import MultiHeadLayerNorm
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMState,
    neutral_gates,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class mLSTMLayer(nn.Module):
    """mLSTM layer of xLSTM-7B, with a sigmoid output gate.

    The layer sows `gate_moments`, see `_run_cell`; `ogate` is the sigmoid of the output gate.

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
        reset: jax.Array | None = None,
        padding: jax.Array | None = None,
        state: MLSTMState | None = None,
    ) -> tuple[jax.Array, MLSTMState | None]:
        """Runs the layer on local tokens and heads; the state has the leading axes `(B, NH)`."""
        config, overlap = self.config.model, self.config.mesh.tp_overlap
        embedding_dim = x.shape[-1]
        numerics = {"dtype": config.compute_dtype, "precision": config.precision}

        def dense(name: str, features: int) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(features, init_fn, (None, "tp"), **numerics, name=name)

        def gate(name: str, bias_init: Callable) -> Dense:
            # The gates do not depend on the input at first.
            init_fn = nn.initializers.zeros
            return Dense(config.num_heads, init_fn, (None, "tp"), bias_init, **numerics, name=name)

        layers = {
            "q": dense("q", config.qk_dim),
            "k": dense("k", config.qk_dim),
            "v": dense("v", config.v_dim),
            "igate": gate("igate_preact", nn.initializers.constant(config.igate_bias_init)),
            "fgate": gate("fgate_preact", _forget_bias_init),
            "ogate": dense("ogate_preact", config.v_dim),
        }
        y = column_parallel(
            lambda x: {name: layer(x) for name, layer in layers.items()}, x, "tp", overlap=overlap
        )
        inputs = _CellInputs(**y | {"ogate": nn.sigmoid(y["ogate"])})
        h, state = _run_cell(self, self.config, inputs, reset, padding, state)
        out_init = wang_init(embedding_dim, config.num_blocks)
        out_proj = Dense(embedding_dim, out_init, ("tp", None), **numerics, name="out_proj")
        return row_parallel(out_proj, inputs.ogate * h, "tp", overlap=overlap), state


class mLSTMPreUpLayer(nn.Module):
    """mLSTM layer of the 2024 paper: `proj_down((norm(h) + skip * c) * silu(proj_up_gate(x)))`.

    With `u = proj_up(x)` and `c = silu(conv(u))`, the cell computes `h` from queries and keys that
    are projections of `c`, and values that are a projection of `u`. The input and forget gates are
    projections of all three.

    The layer sows `gate_moments`, see `_run_cell`; `ogate` is `silu(proj_up_gate(x))`.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figure 11.
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
        """Runs the layer on local tokens, heads and channels; the cell's state is `MLSTMState`."""
        config, overlap = self.config.model, self.config.mesh.tp_overlap
        dtype, embedding_dim = config.compute_dtype, x.shape[-1]
        numerics = {"dtype": dtype, "precision": config.precision}
        cell_state, last_inputs = state or (None, None)

        def up(name: str) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(config.inner_dim, init_fn, (None, "tp"), **numerics, name=name)

        proj_up, proj_up_gate = up("proj_up"), up("proj_up_gate")
        u, z = column_parallel(lambda x: (proj_up(x), proj_up_gate(x)), x, "tp", overlap=overlap)
        conv = CausalConvolution(config.conv_width, dtype, context_axis="cp", name="conv")
        c, last_inputs = conv(u, reset, padding, last_inputs)
        c = nn.silu(c)

        def project(name: str, y: jax.Array) -> jax.Array:
            return BlockDiagonal(config.qkv_block_size, **numerics, name=name)(y)

        def gate(name: str, bias_init: Callable) -> jax.Array:
            return _HeadGate(config.num_heads, bias_init, **numerics, name=name)(qkv)

        qkv = project("q", c), project("k", c), project("v", u)
        igate = gate("igate_preact", nn.initializers.normal(0.1))
        fgate = gate("fgate_preact", _forget_bias_init)
        inputs = _CellInputs(*qkv, igate, fgate, ogate=nn.silu(z))
        h, cell_state = _run_cell(self, self.config, inputs, reset, padding, cell_state)
        skip = boxed_parameter(self, "skip", nn.initializers.ones, c.shape[-1:], ("tp",))
        down_init = wang_init(embedding_dim, config.num_blocks)
        down = Dense(embedding_dim, down_init, ("tp", None), **numerics, name="proj_down")
        y = (h + skip.astype(dtype) * c) * inputs.ogate
        y = row_parallel(down, y, "tp", overlap=overlap)
        return y, None if state is None else ConvolutionalState(cell_state, last_inputs)


class _CellInputs(NamedTuple):
    """Inputs of the cell of the local heads.

    Attributes:
        q: Queries `(B, T, NH * DHQK)`.
        k: Keys `(B, T, NH * DHQK)`.
        v: Values `(B, T, NH * DHV)`.
        igate: Input gate pre-activations `(B, T, NH)`.
        fgate: Forget gate pre-activations `(B, T, NH)`.
        ogate: Factor of the cell's output, `(B, T, NH * DHV)`, for statistics alone.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    igate: jax.Array
    fgate: jax.Array
    ogate: jax.Array


def _run_cell(
    layer: nn.Module,
    config: LanguageModelConfig,
    inputs: _CellInputs,
    reset: jax.Array | None,
    padding: jax.Array | None,
    state: MLSTMState | None,
) -> tuple[jax.Array, MLSTMState | None]:
    """Runs the configured backend and normalizes each head; called in a layer's compact method.

    The call creates the submodule `multihead_norm` of the layer. It sows `gate_moments`, see
    `sow_gate_moments`, of the soft-capped pre-activations `igate` and `fgate`, and of `ogate`.

    Args:
        layer: The layer.
        config: Configuration of the model.
        inputs: Inputs of the cell.
        reset: See `xlstm.common_types`.
        padding: See `xlstm.common_types`.
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
    h = create_backend(config.backend, model, context_axis="cp")(
        *(q, k, v, igate, fgate, *(state or ())),
        return_last_states=state is not None,
        reset=None if reset is None else reset[:, None, :],
    )
    h, state = h if state is not None else (h, None)
    h = MultiHeadLayerNorm(model.norm_eps, model.compute_dtype, name="multihead_norm")(h)
    sow_gate_moments(layer, igate, fgate, inputs.ogate)
    return h, state


class _HeadGate(nn.Module):
    """Pre-activations of a gate, one for each head, from the channels of all heads.

    Attributes:
        num_heads: Global number of heads, NH.
        bias_init: Initializer of the bias.
        dtype: Type of the factors; products are summed in float32.
        precision: Precision of the products.
    """

    num_heads: int
    bias_init: Callable
    dtype: jnp.dtype
    precision: lax.Precision | None

    @nn.compact
    def __call__(self, qkv: tuple[jax.Array, ...]) -> jax.Array:
        """Maps local channels, each `(B, T, C)`, to local heads, float32 `(B, T, NH / tp)`."""
        *leading, channels = qkv[0].shape
        shape, axes = (len(qkv), channels, self.num_heads), (None, "tp", None)
        # The gates do not depend on the input at first.
        kernel = boxed_parameter(self, "kernel", nn.initializers.zeros, shape, axes)
        products = (
            jnp.dot(
                x.reshape(-1, channels).astype(self.dtype),
                part.astype(self.dtype),
                # Without `product_precision`: products of the gradient have a float32 factor.
                precision=self.precision,
                preferred_element_type=jnp.float32,
            )
            for x, part in zip(qkv, kernel, strict=True)
        )
        y = scatter_features(sum(products).reshape(*leading, self.num_heads), "tp")
        return y + boxed_parameter(self, "bias", self.bias_init, y.shape[-1:], ("tp",))


def _forget_bias_init(rng, shape, dtype):
    """Initializes the forget gates' biases from 3 to 6, so that memory spans differ by head."""
    del rng
    return jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)
