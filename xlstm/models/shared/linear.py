"""Linear layers, the embedding, their boxed parameters and initializers, and the soft cap."""

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

# The mesh axes that a dimension is sharded over: one, several, or None.
Axes = str | tuple[str, ...] | None

_LARGEST_SUM = 8  # Block sizes up to which products are summed term by term.


def small_init(embedding_dim: int) -> initializers.Initializer:
    """Returns a normal initializer with deviation `sqrt(2 / (5 D))`, for in-projections.

    Embeddings and the head use it as well.

    Args:
        embedding_dim: `D`.

    References:
        Nguyen and Salazar, "Transformers without Tears", 2019, section 2.2.
    """
    return initializers.normal(math.sqrt(2 / (5 * embedding_dim)))


def wang_init(embedding_dim: int, num_blocks: int) -> initializers.Initializer:
    """Returns a normal initializer with deviation `2 / (num_blocks sqrt(D))`, for out-projections.

    Args:
        embedding_dim: `D`.
        num_blocks: Number of residual blocks.

    References:
        Wang and Komatsuzaki, "Mesh-Transformer-JAX", 2021.
    """
    return initializers.normal(2 / (num_blocks * math.sqrt(embedding_dim)))


def boxed_parameter(
    module: nn.Module,
    name: str,
    init_fn: Callable,
    shape: tuple[int, ...],
    axis_names: tuple[Axes, ...],
) -> jax.Array:
    """Creates or reads a float32 parameter stored in an `nn.Partitioned` box.

    Args:
        module: The module that owns the parameter.
        name: Its name in the module.
        init_fn: `init_fn(rng, shape, dtype)`.
        shape: Its local shape; the global one outside of `shard_map`, where parameters are
            initialized.
        axis_names: For each dimension, the mesh axes that it is sharded over.

    Returns:
        The array. Parameters without a box are accepted as well.
    """
    init_fn = nn.with_partitioning(init_fn, axis_names)
    box = module.param(name, init_fn, shape, jnp.float32, unbox=False)
    # `nn.Partitioned.unbox` adds a sharding constraint, which fails inside of `shard_map`.
    return box.value if isinstance(box, nn.Partitioned) else box


class Dense(nn.Module):
    """Dense layer with boxed parameters: `y = x W + b` over the last axis.

    Leading axes are flattened before the product: with two of them, XLA on CPU transposes inside a
    fused copy for the weight gradient, which costs more than the product itself.

    Attributes:
        features: Global size of the last axis of the output.
        kernel_init: Initializer of the `kernel`, shape `(in_features, features)`.
        kernel_axes: Mesh axes that the two dimensions of the kernel are sharded over. The layer
            computes the local product alone; `xlstm.distributed.tensor_parallel` communicates.
        bias_init: Initializer of the `bias`, shape `(features,)`; None for no bias.
        dtype: Type of the computation and of the output.
        precision: See `product_precision`.
    """

    features: int
    kernel_init: Callable
    kernel_axes: tuple[Axes, Axes]
    bias_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    precision: lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps local `(..., in_features)` to local `(..., features)`."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_blocks(
    x: jax.Array, kernel: jax.Array, precision: lax.Precision | None = None
) -> jax.Array:
    """Multiplies by a block-diagonal matrix.

    With small blocks, the product and its gradient for `x` are sums of a few terms that XLA fuses.
    The gradient of the blocks is a batched matrix product, which is the fastest way for it but
    takes five times as long for all three.

    Args:
        x: Inputs `(..., C)`.
        kernel: Blocks `(C / S, S, S)`, with the inputs on the rows.
        precision: See `product_precision`.

    Returns:
        Outputs `(..., C)`.
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


class BlockDiagonal(nn.Module):
    """Block-diagonal layer: `y = x W + b` over the last axis, W with square blocks.

    Attributes:
        block_size: Number of channels in a block, S.
        dtype: Type of the computation and of the output.
        bias_init: Initializer of the `bias`, shape `(C,)`; None for no bias.
        precision: See `product_precision`.
        block_axes: Mesh axes that the blocks are sharded over.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), figures 10 (one block per head) and 11
        (blocks of 4).
    """

    block_size: int
    dtype: jnp.dtype = jnp.float32
    bias_init: Callable | None = None
    precision: lax.Precision | None = None
    block_axes: Axes = "tp"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps local channels `(..., C)` to as many outputs; S must divide C."""
        shape = (x.shape[-1] // self.block_size, self.block_size, self.block_size)
        init_fn = small_init(self.block_size)
        kernel = boxed_parameter(self, "kernel", init_fn, shape, (self.block_axes, None, None))
        y = multiply_blocks(x.astype(self.dtype), kernel.astype(self.dtype), self.precision)
        if self.bias_init is not None:
            bias = boxed_parameter(self, "bias", self.bias_init, x.shape[-1:], (self.block_axes,))
            y = y + bias.astype(self.dtype)
        return y


class Embedding(nn.Module):
    """Embedding table, sharded over the vocabulary.

    Attributes:
        vocab_size: Number of token ids, `V`.
        embedding_dim: Size of a vector, `D`.
        init_fn: Initializer of the table.
        dtype: Type of the output.
    """

    vocab_size: int
    embedding_dim: int
    init_fn: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `(B, T)` to the vectors of the local tokens, `(B, T / tp, D)`."""
        shape = (self.vocab_size // axis_size(VOCAB_AXES), self.embedding_dim)
        table = boxed_parameter(self, "embedding", self.init_fn, shape, (VOCAB_AXES, None))
        # Convert after the lookup, so that gradients of a row are summed in the table's type.
        x = embed_tokens(table, tokens, VOCAB_AXES).astype(self.dtype)
        x = scatter_tokens(x, "tp")
        return lax.psum(x, "pp") if axis_size("pp") > 1 else x


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Returns `cap * tanh(x / cap)`, which is within `(-cap, cap)`; a cap of 0 returns `x`."""
    return cap * jnp.tanh(x / cap) if cap else x
