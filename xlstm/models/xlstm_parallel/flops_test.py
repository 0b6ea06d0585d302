import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel

_B, _T = 2, 64
_MODEL = ModelConfig(vocab_size=96, embedding_dim=64, num_blocks=3, remat="none")


def _count_products(jaxpr):
    """Counts the operations of the products in a program, with all iterations of loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summands = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * summands * equation.outvars[0].aval.size
        times = equation.params.get("length", 1)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += times * _count_products(inner)
    return total


def _products_per_token(config):
    """Returns the operations of a forward pass, and of a forward and a backward pass."""
    model = xLSTMLMModel(config)
    tokens = jnp.zeros((_B, _T), int)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def loss(params):
        arguments = tokens, tokens, tokens == 0
        return model.apply({"params": params}, *arguments, method="next_token_nll")[0]

    programs = (jax.make_jaxpr(fn)(params).jaxpr for fn in (loss, jax.grad(loss)))
    return [_count_products(program) / (_B * _T) for program in programs]


@pytest.mark.parametrize("chunk_size", [16, 0])
def test_count_is_that_of_the_program_without_masked_pairs(chunk_size):
    config = LanguageModelConfig(_MODEL, BackendConfig(chunk_size=chunk_size))
    forward, both = _products_per_token(config)
    # The program computes all pairs of a chunk and masks half of them.
    length = chunk_size or _T
    masked = _MODEL.num_blocks * length * (_MODEL.qk_dim + _MODEL.v_dim)
    expected = count_flops_per_token(config, _T)
    assert forward == expected / 3 + masked
    # The gradient of the forget gates sums over pairs with a product that is not necessary.
    sums = _MODEL.num_blocks * _MODEL.num_heads * 2 * length**2
    assert both == expected + 3 * masked + sums


def test_count_is_that_of_the_program_for_the_block_of_2024():
    model = dataclasses.replace(_MODEL, block="xlstm_2024")
    config = LanguageModelConfig(model, BackendConfig(chunk_size=16))
    forward, both = _products_per_token(config)
    masked = model.num_blocks * 16 * 2 * model.inner_dim
    sums = model.num_blocks * model.num_heads * 2 * 16**2
    # Elementwise sums, not products, compute the convolution and, except for the gradient of their
    # kernels, the block-diagonal projections.
    channels = 2 * model.num_blocks * model.inner_dim
    convolution, projections = channels * model.conv_width, channels * 3 * model.qkv_block_size
    expected = count_flops_per_token(config, _T)
    assert forward == expected / 3 + masked - convolution - projections
    assert both == expected + 3 * masked + sums - 3 * convolution - 2 * projections


def test_count_is_that_of_the_program_for_slstm_blocks():
    model = dataclasses.replace(_MODEL, ratio="[0:1]")
    config = LanguageModelConfig(model)
    forward, both = _products_per_token(config)
    # Elementwise sums, not products, compute the convolution.
    convolution = 2 * model.num_blocks * model.embedding_dim * model.conv_width
    # The backward pass recomputes the recurrent products.
    again = model.num_blocks * 8 * model.embedding_dim**2 // model.num_heads
    expected = count_flops_per_token(config, _T)
    assert forward == expected / 3 - convolution
    assert both == expected - 3 * convolution + again
    mixed = dataclasses.replace(_MODEL, slstm_at=(1,))
    counts = [count_flops_per_token(LanguageModelConfig(m), _T) for m in (_MODEL, mixed, model)]
    assert 3 * (counts[1] - counts[0]) == counts[2] - counts[0]


def test_recomputation_does_not_count():
    counts = set()
    for remat in ("none", "dots", "block"):
        model = dataclasses.replace(_MODEL, remat=remat)
        counts.add(count_flops_per_token(LanguageModelConfig(model), _T))
    assert len(counts) == 1


def test_a_chunk_is_not_longer_than_the_sequence():
    def count(**backend):
        return count_flops_per_token(LanguageModelConfig(_MODEL, BackendConfig(**backend)), 48)

    assert count(chunk_size=1000) == count(chunk_size=48) == count(chunk_size=0)
    assert count(chunk_size=-1) == count(chunk_size=64)
    assert count(name="recurrent") == count(chunk_size=1) < count(chunk_size=2)
    # Without a state nothing is written or read.
    state = 4 * _MODEL.qk_dim * _MODEL.v_dim // _MODEL.num_heads
    expected = count(chunk_size=0) - 3 * _MODEL.num_blocks * state
    assert count(name="parallel_stabilized") == expected


def test_the_count_does_not_depend_on_the_chunk_size_that_the_device_takes():
    counts = [
        count_flops_per_token(LanguageModelConfig(_MODEL, BackendConfig(chunk_size=size)), 1024)
        for size in (-1, 64, 128)
    ]
    assert counts[0] == counts[1] < counts[2]


def test_xlstm_7b():
    """Expects about 6 operations per parameter outside of the embedding, plus the cell."""
    model = ModelConfig(vocab_size=50304, embedding_dim=4096, num_blocks=32, num_heads=8)
    count = count_flops_per_token(LanguageModelConfig(model), 8192)
    num_params = 6_865_424_896 - 50304 * 4096
    assert 1.005 < count / (6 * num_params) < 1.02
