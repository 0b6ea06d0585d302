"""The matrix products of a lowered program, and how exactly each is to be computed."""

import re
from typing import NamedTuple

import jax

_PRODUCT = re.compile(
    r"stablehlo\.dot_general [^\n]*precision = \[(\w+), (\w+)\][^\n]*"
    r" : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>"
)


class LoweredProduct(NamedTuple):
    """A matrix product; types are such as `8x4xf32`.

    Attributes:
        precisions: What is asked for the two operands, such as `HIGHEST`.
        operands: The types of the two operands.
        result: The type of the result.
    """

    precisions: tuple[str, str]
    operands: tuple[str, str]
    result: str

    @property
    def has_float32(self) -> bool:
        """Whether one of the operands is float32."""
        return any(operand.endswith("f32") for operand in self.operands)


def gpu_products(traced: jax.stages.Traced) -> list[LoweredProduct]:
    """Lowers a program for a GPU, which need not be there; see `lowered_products`."""
    return lowered_products(traced.lower(lowering_platforms=("cuda",)))


def lowered_products(lowered: jax.stages.Lowered) -> list[LoweredProduct]:
    """Lists the matrix products of a program.

    Args:
        lowered: The program.

    Returns:
        All products, in the order of the text, those in functions and loops once.

    Raises:
        ValueError: If a product cannot be read, or something else is there that multiplies.
    """
    text = lowered.as_text()
    found = [
        LoweredProduct((left, right), tuple(operands), result)
        for left, right, *operands, result in _PRODUCT.findall(text)
    ]
    if len(found) != len(re.findall(r"stablehlo\.(?:dot|convolution|composite)", text)):
        raise ValueError("there are products that cannot be read")
    return found
