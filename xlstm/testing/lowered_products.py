"""The matrix products of a lowered program, with their requested precision."""

import re
from typing import NamedTuple

import jax

_PRODUCT = re.compile(
    r"stablehlo\.dot_general [^\n]*precision = \[(\w+), (\w+)\][^\n]*"
    r" : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>"
)


class LoweredProduct(NamedTuple):
    """A matrix product.

    Attributes:
        precisions: The requested precision of the two operands, such as `HIGHEST`.
        operands: The types of the two operands, such as `8x4xf32`.
        result: The type of the result.
    """

    precisions: tuple[str, str]
    operands: tuple[str, str]
    result: str

    @property
    def has_float32(self) -> bool:
        """Whether an operand is float32."""
        return any(operand.endswith("f32") for operand in self.operands)


def gpu_products(traced: jax.stages.Traced) -> list[LoweredProduct]:
    """Lowers a program for a GPU, without needing one; see `lowered_products`."""
    return lowered_products(traced.lower(lowering_platforms=("cuda",)))


def lowered_products(lowered: jax.stages.Lowered) -> list[LoweredProduct]:
    """Lists the matrix products of a program.

    Args:
        lowered: The program.

    Returns:
        All products, in the order of the program text; a product in a function or loop occurs once.

    Raises:
        ValueError: A product cannot be parsed, or another operation multiplies matrices.
    """
    text = lowered.as_text()
    found = [
        LoweredProduct((left, right), tuple(operands), result)
        for left, right, *operands, result in _PRODUCT.findall(text)
    ]
    if len(found) != len(re.findall(r"stablehlo\.(?:dot|convolution|composite)", text)):
        raise ValueError("the program has matrix products that cannot be parsed")
    return found
