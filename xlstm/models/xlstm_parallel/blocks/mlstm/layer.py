"""mLSTM layers: the cell with its gates, and the projections around it."""

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


class mLSTMLayer(nn.Module):
    """Multi-head mLSTM with a sigmoid output gate.

    It sows `gate_moments`, see `run_cell`; `ogate` is the open share of the output gate.

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
        embedding_dim = x.shape[-1]
        numerics = {"dtype": config.compute_dtype, "precision": config.precision}

        def dense(name: str, features: int) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(features, init_fn, (None, "tp"), **numerics, name=name)

        def gate(name: str, bias_init: Callable) -> Dense:
            # Initially the gates do not depend on the input.
            init_fn = nn.initializers.zeros
            return Dense(config.num_heads, init_fn, (None, "tp"), bias_init, **numerics, name=name)

        layers = {
            "q": dense("q", config.qk_dim),
            "k": dense("k", config.qk_dim),
            "v": dense("v", config.v_dim),
            "igate": gate("igate_preact", nn.initializers.constant(config.igate_bias_init)),
            "fgate": gate("fgate_preact", forget_bias_init),
            "ogate": dense("ogate_preact", config.v_dim),
        }
        y = column_parallel(
            lambda x: {name: layer(x) for name, layer in layers.items()}, x, "tp", overlap=overlap
        )
        inputs = CellInputs(**y | {"ogate": nn.sigmoid(y["ogate"])})
        h, state = run_cell(self, self.config, inputs, reset, padding, state)
        out_init = wang_init(embedding_dim, config.num_blocks)
        out_proj = Dense(embedding_dim, out_init, ("tp", None), **numerics, name="out_proj")
        return row_parallel(out_proj, inputs.ogate * h, "tp", overlap=overlap), state


class mLSTMPreUpLayer(nn.Module):
    """Pre up-projection mLSTM: `proj_down((norm(h) + skip * c) * silu(proj_up_gate(x)))`.

    Here `c = silu(conv(u))` with `u = proj_up(x)`, and `h` is what the cell makes of queries and
    keys of `c` and of values of `u`; its input and forget gates see all three.

    It sows `gate_moments`, see `run_cell`; `ogate` is `silu(proj_up_gate(x))`.

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
        reset: jax.Array | None,
        padding: jax.Array | None,
        state: ConvolutionalState | None,
    ) -> tuple[jax.Array, ConvolutionalState | None]:
        """Runs the layer.

        Args:
            x: This device's tokens, `(B, T / tp, D)`.
            reset: Where the state is dropped before the token, bool `(B, T)`, or None.
            padding: Which tokens leave no trace in the state, bool `(B, T)`, or None.
            state: State of this device's heads and channels before the first token, its cell's an
                `MLSTMState`; None for zero.

        Returns:
            The output `(B, T / tp, D)`, and the last state if `state` was given, else None.
        """
        config, overlap = self.config.model, self.config.mesh.tp_overlap
        dtype, embedding_dim = config.compute_dtype, x.shape[-1]
        numerics = {"dtype": dtype, "precision": config.precision}
        cell_state, last_inputs = state or (None, None)

        def up(name: str) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(config.inner_dim, init_fn, (None, "tp"), **numerics, name=name)

        proj_up, proj_up_gate = up("proj_up"), up("proj_up_gate")
        u, z = column_parallel(lambda x: (proj_up(x), proj_up_gate(x)), x, "tp", overlap=overlap)
        conv = CausalConvolution(config.conv_width, dtype, name="conv")
        c, last_inputs = conv(u, reset, padding, last_inputs)
        c = nn.silu(c)

        def project(name: str, y: jax.Array) -> jax.Array:
            return BlockDiagonal(config.qkv_block_size, **numerics, name=name)(y)

        def gate(name: str, bias_init: Callable) -> jax.Array:
            return _HeadGate(config.num_heads, bias_init, **numerics, name=name)(qkv)

        qkv = project("q", c), project("k", c), project("v", u)
        igate = gate("igate_preact", nn.initializers.normal(0.1))
        fgate = gate("fgate_preact", forget_bias_init)
        inputs = CellInputs(*qkv, igate, fgate, ogate=nn.silu(z))
        h, cell_state = run_cell(self, self.config, inputs, reset, padding, cell_state)
        skip = boxed_parameter(self, "skip", nn.initializers.ones, c.shape[-1:], ("tp",))
        down_init = wang_init(embedding_dim, config.num_blocks)
        down = Dense(embedding_dim, down_init, ("tp", None), **numerics, name="proj_down")
        y = (h + skip.astype(dtype) * c) * inputs.ogate
        y = row_parallel(down, y, "tp", overlap=overlap)
        return y, None if state is None else ConvolutionalState(cell_state, last_inputs)


class _HeadGate(nn.Module):
    """Pre-activations of a gate, one a head, that see the channels of all heads.

    Attributes:
        num_heads: Number of heads of all devices together, NH.
        bias_init: Initializer of the bias.
        dtype: Type of the products; their sum is float32.
        precision: How exactly float32 is multiplied.
    """

    num_heads: int
    bias_init: Callable
    dtype: jnp.dtype
    precision: lax.Precision | None

    @nn.compact
    def __call__(self, qkv: tuple[jax.Array, ...]) -> jax.Array:
        """Maps this device's channels, each `(B, T, C)`, to float32 `(B, T, NH / tp)`."""
        *leading, channels = qkv[0].shape
        shape, axes = (len(qkv), channels, self.num_heads), (None, "tp", None)
        # Initially the gates do not depend on the input.
        kernel = boxed_parameter(self, "kernel", nn.initializers.zeros, shape, axes)
        products = (
            jnp.dot(
                x.reshape(-1, channels).astype(self.dtype),
                part.astype(self.dtype),
                # Whatever the type: of the products of the gradient one factor is float32.
                precision=self.precision,
                preferred_element_type=jnp.float32,
            )
            for x, part in zip(qkv, kernel, strict=True)
        )
        y = scatter_features(sum(products).reshape(*leading, self.num_heads), "tp")
        return y + boxed_parameter(self, "bias", self.bias_init, y.shape[-1:], ("tp",))
