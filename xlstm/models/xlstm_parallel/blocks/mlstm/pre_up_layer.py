"""The mLSTM layer of the 2024 paper: the cell runs in a space twice as wide as the model."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.tensor_parallel import column_parallel, row_parallel, scatter_features
from xlstm.models.shared.block_diagonal import BlockDiagonal
from xlstm.models.shared.convolution import CausalConvolution, ConvolutionalState
from xlstm.models.shared.dense import Dense
from xlstm.models.shared.init import small_init, wang_init
from xlstm.models.shared.parameters import boxed_parameter
from xlstm.models.xlstm_parallel.blocks.mlstm.cell import CellInputs, forget_bias_init, run_cell
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


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
