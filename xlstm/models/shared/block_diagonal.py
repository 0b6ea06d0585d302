"""Projection that mixes neighbouring channels."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.init import small_init
from xlstm.models.shared.parameters import boxed_parameter
from xlstm.models.shared.precision import product_precision

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
