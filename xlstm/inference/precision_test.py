"""Tests of `model.matmul_precision`: the products of inference programs, lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from xlstm.inference.decode import decode, decode_step, init_decode_state, prefill_step, row_keys
from xlstm.inference.sampling import SamplingConfig
from xlstm.models.xlstm_parallel.precision_testing import (
    CASES,
    TOKENS,
    abstract_params,
    assert_bfloat16_products,
    assert_float32_products,
    config_of,
)
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state
from xlstm.testing.lowered_products import gpu_products

of_all_cases = pytest.mark.parametrize("block, backend", CASES)


@pytest.fixture(autouse=True)
def _jax_is_set_to_nothing():
    with jax.default_matmul_precision(None):
        yield


def programs(config):
    """Returns the products of the programs that prefill and decode."""
    params = abstract_params(config)
    state = jax.eval_shape(functools.partial(initial_state, config, 2))
    decode_state = jax.eval_shape(functools.partial(init_decode_state, config, 2))
    one_each = jax.ShapeDtypeStruct((2,), jnp.int32)
    keys = row_keys(jax.random.key(0), range(2))
    options = {"config": config, "sampling": SamplingConfig(), "max_tokens": 3}
    traced = {
        "prefill": prefill_step.trace(params, TOKENS, state, one_each, config=config),
        "decode_step": decode_step.trace(params, one_each, state, config=config),
        "decode": decode.trace(params, decode_state, keys, 3, **options),
    }
    return {name: gpu_products(program) for name, program in traced.items()}


@of_all_cases
def test_float32_is_multiplied_in_float32(block, backend):
    assert_float32_products(programs(config_of(block, backend)))


@of_all_cases
def test_bfloat16_is_multiplied_in_bfloat16_and_what_is_float32_there_in_float32(block, backend):
    count = assert_bfloat16_products(programs(config_of(block, backend, dtype="bfloat16")))
    # sLSTM blocks have no such products.
    assert bool(count) == (block != "slstm")
