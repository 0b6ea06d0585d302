"""Tests of `model.matmul_precision`: the products of training and evaluation, lowered for a GPU."""

import jax
import pytest

from xlstm.models.xlstm_parallel.precision_testing import (
    CASES,
    TOKENS,
    abstract_params,
    assert_bfloat16_products,
    assert_float32_products,
    config_of,
)
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.testing.lowered_products import gpu_products

MASK = jax.ShapeDtypeStruct((2, 12), bool)
of_all_cases = pytest.mark.parametrize("block, backend", CASES)


@pytest.fixture(autouse=True)
def _jax_is_set_to_nothing():
    with jax.default_matmul_precision(None):
        yield


def gradient(config):
    """Returns the products of the training step, including those of the gates' statistics."""

    def loss(params, *batch):
        outputs, _ = xLSTMLMModel(config).apply(
            {"params": params}, *batch, method="next_token_nll", mutable=["intermediates"]
        )
        return outputs[0]

    # The gradient of a compiled function is traced later than the function.
    trace = jax.jit(jax.grad(jax.jit(loss))).trace
    return gpu_products(trace(abstract_params(config), TOKENS, TOKENS, MASK, MASK))


def programs(config):
    """Returns the products of the programs that train and evaluate a model."""
    model, params = xLSTMLMModel(config), abstract_params(config)

    def evaluate(params, *batch):
        return model.apply({"params": params}, *batch, method="eval_sums")

    def head(params, x):
        return model.apply({"params": params}, x, method="_logits")

    x = jax.ShapeDtypeStruct((2, 12, config.model.embedding_dim), config.model.compute_dtype)
    traced = {
        "evaluation": jax.jit(evaluate).trace(params, TOKENS, TOKENS, MASK, MASK),
        "head": jax.jit(head).trace(params, x),
    }
    products = {name: gpu_products(program) for name, program in traced.items()}
    return products | {"gradient": gradient(config)}


def sums_gates(product):
    """Returns whether a product is a sum over pairs of tokens, which is always exact."""
    return product.operands[1] in ("4x4xf32", "12x12xf32")


@of_all_cases
def test_float32_is_multiplied_in_float32(block, backend):
    assert_float32_products(programs(config_of(block, backend)))


@of_all_cases
def test_bfloat16_is_multiplied_in_bfloat16_and_what_is_float32_there_in_float32(block, backend):
    count = assert_bfloat16_products(programs(config_of(block, backend, dtype="bfloat16")))
    # sLSTM blocks have no such products.
    assert bool(count) == (block != "slstm")


@of_all_cases
def test_less_can_be_asked_for(block, backend):
    products = gradient(config_of(block, backend, matmul_precision="default"))
    asked = [product.precisions for product in products if not sums_gates(product)]
    assert set(asked) == {("DEFAULT", "DEFAULT")}
    assert len(products) - len(asked) == (block != "slstm" and backend != "recurrent")


def test_the_default_is_that_of_jax():
    with jax.default_matmul_precision("highest"):
        products = gradient(config_of("xlstm_7b", "fwbw", matmul_precision="default"))
    assert {product.precisions for product in products} == {("HIGHEST", "HIGHEST")}
