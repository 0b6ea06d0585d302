"""Checks of the precision of matrix products, for tests of programs lowered for a GPU."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from xlstm.common_types import PyTree
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.testing import small_config
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.testing.lowered_products import LoweredProduct

TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)

_BLOCKS = {
    "xlstm_7b": {},
    "xlstm_2024": {"block": "xlstm_2024", "remat": "block"},
    "slstm": {"ratio": "[0:1]", "remat": "none"},
}

# Blocks and backends to check, for `config_of`.
CASES = [
    *((block, "fwbw") for block in _BLOCKS),
    ("xlstm_7b", "parallel_stabilized"),
    ("xlstm_7b", "recurrent"),
]


def config_of(block: str, backend: str, **options) -> LanguageModelConfig:
    """Returns the configuration of a small model for one of the `CASES`."""
    return small_config(backend, **_BLOCKS[block] | options)


def abstract_params(config: LanguageModelConfig) -> PyTree:
    """Returns the shapes and dtypes of a model's parameters, without boxes."""
    init = xLSTMLMModel(config).init
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), TOKENS))["params"]


def assert_float32_products(programs: Mapping[str, Sequence[LoweredProduct]]) -> None:
    """Asserts that all products have float32 operands and the highest precision.

    Args:
        programs: The products of each program, by its name.
    """
    for name, products in programs.items():
        assert products, name
        for product in products:
            assert product.operands[0].endswith("xf32") and product.operands[1].endswith("xf32")
            assert product.precisions == ("HIGHEST", "HIGHEST"), (name, product)


def assert_bfloat16_products(programs: Mapping[str, Sequence[LoweredProduct]]) -> int:
    """Asserts that products have the default precision, those of float32 operands the highest.

    Args:
        programs: The products of each program, by its name; each has bfloat16 products.

    Returns:
        The number of products with a float32 operand.
    """
    count = 0
    for name, products in programs.items():
        assert any(product.operands[0].endswith("bf16") for product in products), name
        for product in products:
            # The gradient of a gate of a head, which depends on 32 channels, has a float32 factor.
            is_gate = product.operands[1] == "32x2xbf16"
            precision = "HIGHEST" if product.has_float32 or is_gate else "DEFAULT"
            assert product.precisions == (precision, precision), (name, product)
            count += product.has_float32
    return count
