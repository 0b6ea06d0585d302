"""How exactly matrix products of float32 numbers are computed."""

import jax
import jax.numpy as jnp
from jax import lax

# What a configuration may name. None leaves it to JAX's own setting.
PRECISIONS: dict[str, lax.Precision | None] = {
    "default": None,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
}


def product_precision(
    precision: lax.Precision | None, *operands: jax.Array
) -> lax.Precision | None:
    """Returns the precision to ask of a product.

    Narrower numbers are multiplied as they are, and exactly. For them nothing is asked: XLA on GPUs
    would keep some of its kernels from a product that asks for more than the default.

    Args:
        precision: How exactly float32 numbers are multiplied.
        *operands: What is multiplied.

    Returns:
        The same, if there is a float32 (or wider) number among the operands, else None.
    """
    is_float32 = any(jnp.finfo(x.dtype).bits >= 32 for x in operands)
    return precision if is_float32 else None
