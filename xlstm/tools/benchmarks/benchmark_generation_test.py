import jax
import jax.numpy as jnp
import pytest

from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.tools.benchmarks.benchmark_generation import time_generation
from xlstm.trainer.base.param_utils import unboxed


def test_the_figures_fit_each_other():
    config = LanguageModelConfig(ModelConfig(embedding_dim=16, num_blocks=1, num_heads=2))
    params = xLSTMLMModel(config).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    row = time_generation(config, unboxed(params), 2, 20, repeats=2)
    assert (row["batch_size"], row["prompt_length"]) == (2, 20)
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["decode_step_ms"])
    assert 0 < row["prefill_matmul_fraction"] < 1
    assert all(value > 0 for value in row.values())
