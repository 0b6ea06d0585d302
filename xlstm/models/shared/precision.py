"""The precision of float32 matrix products."""

import jax
import jax.numpy as jnp
from jax import lax

# Precisions that a configuration can name; None leaves the choice to JAX.
PRECISIONS: dict[str, lax.Precision | None] = {
    "default": None,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
}


def product_precision(
    precision: lax.Precision | None, *operands: jax.Array
) -> lax.Precision | None:
    """Returns the precision to request for a product.

    Narrower types are always multiplied exactly, so the precision concerns float32 alone. Without
    float32 operands the function requests none, since XLA on GPUs excludes some kernels from
    products that request more than the default.

    Args:
        precision: Precision of products with float32 operands.
        *operands: The factors.

    Returns:
        `precision` if any operand is float32 or wider, else None.
    """
    is_float32 = any(jnp.finfo(x.dtype).bits >= 32 for x in operands)
    return precision if is_float32 else None
