"""Linear layers and embeddings: initial weights, products, the soft cap on what they give."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import lax

from xlstm.distributed.mesh import VOCAB_AXES, axis_size
from xlstm.distributed.tensor_parallel import embed_tokens, scatter_tokens
from xlstm.models.shared.precision import product_precision


def small_init(embedding_dim: int) -> initializers.Initializer:
    """Normal with standard deviation `sqrt(2 / (5 D))`, for embeddings and in-projections.

    Args:
        embedding_dim: `D`.

    References:
        Nguyen and Salazar, "Transformers without Tears", 2019, section 2.2.
    """
    return initializers.normal(math.sqrt(2 / (5 * embedding_dim)))


def wang_init(embedding_dim: int, num_blocks: int) -> initializers.Initializer:
    """Normal with standard deviation `2 / (num_blocks sqrt(D))`, for out-projections.

    Args:
        embedding_dim: `D`.
        num_blocks: Number of residual blocks.

    References:
        Wang and Komatsuzaki, "Mesh-Transformer-JAX", 2021.
    """
    return initializers.normal(2 / (num_blocks * math.sqrt(embedding_dim)))


# The mesh axes that a dimension is cut over: one, several, or None.
Axes = str | tuple[str, ...] | None


def boxed_parameter(
    module: nn.Module,
    name: str,
    init_fn: Callable,
    shape: tuple[int, ...],
    axis_names: tuple[Axes, ...],
) -> jax.Array:
    """Creates or reads a float32 parameter that is stored in an `nn.Partitioned` box.

    Args:
        module: The module that owns the parameter.
        name: Its name in the module.
        init_fn: `init_fn(rng, shape, dtype)`.
        shape: Its shape on this device: outside of `shard_map`, where parameters are initialised,
            the global one.
        axis_names: For every dimension the mesh axes that it is cut over.

    Returns:
        The array itself. A parameter that is given without its box does as well.
    """
    init_fn = nn.with_partitioning(init_fn, axis_names)
    box = module.param(name, init_fn, shape, jnp.float32, unbox=False)
    # `nn.Partitioned.unbox` would add a sharding constraint, an error inside `shard_map`.
    return box.value if isinstance(box, nn.Partitioned) else box


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bounds `x` smoothly to `(-cap, cap)` by `cap * tanh(x / cap)`; a cap of 0 bounds nothing."""
    return cap * jnp.tanh(x / cap) if cap else x


class Dense(nn.Module):
    """`y = x W + b` over the last axis, with boxed parameters.

    All leading axes are flattened to one before the product: with two, XLA on CPU transposes inside
    of a fused copy for the weight gradient, which costs more than the product itself.

    Attributes:
        features: Size of the last axis of the output; of all devices that it is cut over together.
        kernel_init: Initializer of the `kernel`, shape `(in_features, features)`.
        kernel_axes: Mesh axes that the kernel's two dimensions are cut over. The product is this
            device's alone: `xlstm.distributed.tensor_parallel` says what goes around it.
        bias_init: Initializer of the `bias`, shape `(features,)`; None for no bias.
        dtype: Type of the computation and of the output.
        precision: How exactly float32 is multiplied, see `product_precision`.
    """

    features: int
    kernel_init: Callable
    kernel_axes: tuple[Axes, Axes]
    bias_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    precision: lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., in_features)` to this device's `(..., features)`."""
        out_axes = self.kernel_axes[1]
        features = self.features // (axis_size(out_axes) if out_axes else 1)
        shape = (x.shape[-1], features)
        kernel = boxed_parameter(self, "kernel", self.kernel_init, shape, self.kernel_axes)
        operands = x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel.astype(self.dtype)
        y = jnp.matmul(*operands, precision=product_precision(self.precision, *operands))
        if self.bias_init is not None:
            bias = boxed_parameter(self, "bias", self.bias_init, (features,), (out_axes,))
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], features)


_LARGEST_SUM = 8  # Channels of a block up to which products are summed one by one.


class BlockDiagonal(nn.Module):
    """`y = x W + b` over the last axis, where W is zero but for square blocks on its diagonal.

    Attributes:
        block_size: Channels that are mixed, S.
        dtype: Type of the computation and of the output.
        bias_init: Initializer of the `bias`, shape `(C,)`; None for no bias.
        precision: How exactly float32 is multiplied, see `product_precision`.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figures 10 (a block a head) and 11 (blocks of
        4).
    """

    block_size: int
    dtype: jnp.dtype = jnp.float32
    bias_init: Callable | None = None
    precision: lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps this device's channels `(..., C)` to as many; S has to divide C."""
        shape = (x.shape[-1] // self.block_size, self.block_size, self.block_size)
        init_fn = small_init(self.block_size)
        kernel = boxed_parameter(self, "kernel", init_fn, shape, ("tp", None, None))
        y = multiply_blocks(x.astype(self.dtype), kernel.astype(self.dtype), self.precision)
        if self.bias_init is not None:
            bias = boxed_parameter(self, "bias", self.bias_init, x.shape[-1:], ("tp",))
            y = y + bias.astype(self.dtype)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_blocks(
    x: jax.Array, kernel: jax.Array, precision: lax.Precision | None = None
) -> jax.Array:
    """Multiplies by a matrix of blocks on the diagonal.

    With small blocks it and its gradient for `x` are sums of few products that XLA fuses. For the
    gradient of the blocks a batched matrix product is the fastest; for all three it takes five
    times as long.

    Args:
        x: `(..., C)`.
        kernel: The blocks `(C / S, S, S)`, rows for inputs.
        precision: How exactly float32 is multiplied, see `product_precision`.

    Returns:
        `(..., C)`.
    """
    num_blocks, size, _ = kernel.shape
    blocks = x.reshape(*x.shape[:-1], num_blocks, size)
    if size > _LARGEST_SUM:
        precision = product_precision(precision, blocks, kernel)
        y = jnp.einsum("...gi,gio->...go", blocks, kernel, precision=precision)
        return y.reshape(x.shape)
    return sum(blocks[..., i : i + 1] * kernel[:, i] for i in range(size)).reshape(x.shape)


def _multiply_blocks_bwd(
    precision: lax.Precision | None, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    num_blocks, size, _ = kernel.shape
    of_inputs, of_outputs = (z.reshape(-1, num_blocks, size) for z in (x, dy))
    d_kernel = jnp.einsum(
        "ngi,ngo->gio",
        of_inputs,
        of_outputs,
        precision=product_precision(precision, of_inputs, of_outputs),
    )
    return multiply_blocks(dy, kernel.swapaxes(1, 2), precision), d_kernel


multiply_blocks.defvjp(
    lambda x, kernel, precision: (multiply_blocks(x, kernel, precision), (x, kernel)),
    _multiply_blocks_bwd,
)


class Embedding(nn.Module):
    """Looks token ids up in a table.

    Attributes:
        vocab_size: `V`.
        embedding_dim: `D`.
        init_fn: Initializer of the table.
        dtype: Type of the output.
    """

    vocab_size: int
    embedding_dim: int
    init_fn: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `(B, T)` to the vectors of this device's tokens, `(B, T / tp, D)`."""
        shape = (self.vocab_size // axis_size(VOCAB_AXES), self.embedding_dim)
        table = boxed_parameter(self, "embedding", self.init_fn, shape, (VOCAB_AXES, None))
        # The gradient of a row is summed over its tokens in the type of the table.
        x = embed_tokens(table, tokens, VOCAB_AXES).astype(self.dtype)
        x = scatter_tokens(x, "tp")
        return lax.psum(x, "pp") if axis_size("pp") > 1 else x
