"""Tests of the precision that each product requests, in programs lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from xlstm.inference.decode import begin, decode_step, prefill, row_keys, write
from xlstm.inference.sampling import SamplingConfig
from xlstm.models.xlstm_parallel.testing import small_config
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state, xLSTMLMModel
from xlstm.testing.lowered_products import gpu_products

TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
MASK = jax.ShapeDtypeStruct((2, 12), bool)
BLOCKS = {
    "xlstm_7b": {},
    "xlstm_2024": {"block": "xlstm_2024", "remat": "block"},
    "slstm": {"ratio": "[0:1]", "remat": "none"},
}
CASES = [
    *((block, "fwbw") for block in BLOCKS),
    ("xlstm_7b", "parallel_stabilized"),
    ("xlstm_7b", "recurrent"),
]
of_all_cases = pytest.mark.parametrize("block, backend", CASES)


@pytest.fixture(autouse=True)
def _jax_is_set_to_nothing():
    with jax.default_matmul_precision(None):
        yield


def config_of(block, backend, **options):
    return small_config(backend, **BLOCKS[block] | options)


def params_of(config):
    init = xLSTMLMModel(config).init
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), TOKENS))["params"]


def gradient(config):
    """Returns the products of the training step, including those of the gates' statistics."""

    def loss(params, *batch):
        outputs, _ = xLSTMLMModel(config).apply(
            {"params": params}, *batch, method="next_token_nll", mutable=["intermediates"]
        )
        return outputs[0]

    # The gradient of a compiled function is traced later than the function.
    trace = jax.jit(jax.grad(jax.jit(loss))).trace
    return gpu_products(trace(params_of(config), TOKENS, TOKENS, MASK, MASK))


def programs(config):
    """Returns the products of all programs that run a model."""
    model, params = xLSTMLMModel(config), params_of(config)
    state = jax.eval_shape(functools.partial(initial_state, config, 2))
    progress = jax.eval_shape(functools.partial(begin, config, 2))
    one_each = jax.ShapeDtypeStruct((2,), jnp.int32)

    def evaluate(params, *batch):
        return model.apply({"params": params}, *batch, method="eval_sums")

    def head(params, x):
        return model.apply({"params": params}, x, method="_logits")

    writing = {"config": config, "sampling": SamplingConfig(), "max_tokens": 3}
    x = jax.ShapeDtypeStruct((2, 12, config.model.embedding_dim), config.model.compute_dtype)
    traced = {
        "evaluation": jax.jit(evaluate).trace(params, TOKENS, TOKENS, MASK, MASK),
        "head": jax.jit(head).trace(params, x),
        "prefill": prefill.trace(params, TOKENS, state, one_each, config=config),
        "decode_step": decode_step.trace(params, one_each, state, config=config),
        "write": write.trace(params, progress, row_keys(jax.random.key(0), range(2)), 3, **writing),
    }
    products = {name: gpu_products(program) for name, program in traced.items()}
    return products | {"gradient": gradient(config)}


def sums_gates(product):
    """Returns whether a product is a sum over pairs of tokens, which is always exact."""
    return product.operands[1] in ("4x4xf32", "12x12xf32")


@of_all_cases
def test_float32_is_multiplied_in_float32(block, backend):
    for name, products in programs(config_of(block, backend)).items():
        assert products, name
        for product in products:
            assert product.operands[0].endswith("xf32") and product.operands[1].endswith("xf32")
            assert product.precisions == ("HIGHEST", "HIGHEST"), (name, product)


@of_all_cases
def test_bfloat16_is_multiplied_in_bfloat16_and_what_is_float32_there_in_float32(block, backend):
    count = 0
    for name, products in programs(config_of(block, backend, dtype="bfloat16")).items():
        assert any(product.operands[0].endswith("bf16") for product in products), name
        for product in products:
            # The gradient of a gate of a head, which depends on 32 channels, has a float32 factor.
            is_gate = product.operands[1] == "32x2xbf16"
            asked = "HIGHEST" if product.has_float32 or is_gate else "DEFAULT"
            assert product.precisions == (asked, asked), (name, product)
            count += product.has_float32
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
