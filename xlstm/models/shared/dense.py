"""Dense layer on a flattened token axis."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.mesh import axis_size
from xlstm.models.shared.parameters import Axes, boxed_parameter
from xlstm.models.shared.precision import product_precision


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
