"""Tests of the configuration of a model."""

import dataclasses
import math
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import pytest

from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig, check_sizes
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel


def test_sizes_of_xlstm_7b():
    config = ModelConfig(vocab_size=50304, embedding_dim=4096, num_blocks=32, num_heads=8)
    assert (config.qk_dim, config.v_dim, config.ffn_dim) == (2048, 4096, 10944)
    assert (config.gate_soft_cap, config.output_logit_soft_cap) == (15, 30)
    assert (config.norm_eps, config.igate_bias_init) == (1e-6, -10)


def test_sizes_of_the_block_of_2024():
    config = ModelConfig(block="xlstm_2024", embedding_dim=768, num_heads=4)
    assert (config.inner_dim, config.qk_dim, config.v_dim, config.ffn_dim) == (1536, 1536, 1536, 0)
    # Fields of the other block have no effect, even with sizes that it would reject.
    others = {"qk_dim_factor": 0.3, "v_dim_factor": 0.7, "ffn_proj_factor": 9.0}
    config = dataclasses.replace(config, **others)
    assert (config.qk_dim, config.v_dim, config.ffn_dim) == (1536, 1536, 0)
    narrow = ModelConfig(inner_dim_factor=0.01, conv_width=9, qkv_block_size=7)
    assert (narrow.qk_dim, narrow.v_dim) == (64, 128)


def test_a_cap_of_zero_is_none():
    config = ModelConfig(gate_soft_cap=0.0, output_logit_soft_cap=0.0)
    assert config.gate_soft_cap == config.output_logit_soft_cap == 0


def test_compute_type():
    assert ModelConfig().compute_dtype == jnp.float32
    assert ModelConfig(dtype="bfloat16").compute_dtype == jnp.bfloat16


def test_the_default_backend_is_the_chunkwise_one_with_the_exact_bound():
    backend = LanguageModelConfig().backend
    assert backend.name == "fwbw"
    assert backend.stabilize_correctly is True


@pytest.mark.parametrize(
    "name", ["vocab_size", "embedding_dim", "num_blocks", "num_heads", "scan_unroll", "conv_width"]
)
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_are_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"model.{name}={value}.*at least 1"):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 128, "num_heads": 3}, "num_heads=3 does not divide qk_dim = 64"),
        ({"num_heads": 8, "v_dim_factor": 0.03125}, "num_heads=8 does not divide v_dim = 4"),
        ({"qk_dim_factor": 0.0}, "qk_dim_factor=0.0: it must be positive"),
        ({"qk_dim_factor": float("inf")}, "qk_dim_factor=inf: it must be a finite number"),
        ({"gate_soft_cap": float("nan")}, "gate_soft_cap=nan: it must be a finite number"),
        (
            {"output_logit_soft_cap": -1.0},
            "logit_soft_cap=-1.0: it must be positive, or 0 for none",
        ),
        ({"block": "xlstm"}, "block='xlstm' is unknown; expected one of xlstm_7b, xlstm_2024"),
        (
            {"block": "xlstm_2024", "num_heads": 3},
            r"num_heads=3 does not divide inner_dim = 256 \(model.inner_dim_factor \* model",
        ),
        (
            {"block": "xlstm_2024", "qkv_block_size": 3},
            "qkv_block_size=3 does not divide the 64 channels of each head",
        ),
        (
            {"ffn_round_up_to_multiple_of": 0},
            "ffn_round_up_to_multiple_of=0: it must be at least 1",
        ),
        ({"ratio": "7:1"}, r"ratio='7:1': expected a form such as '\[7:1\]', seven mLSTM"),
        ({"ratio": "[0:0]"}, r"ratio='\[0:0\]': expected a form such as '\[7:1\]'"),
        ({"ratio": "[2:1]"}, r"num_blocks=4 is not a multiple of the 3 blocks in model.ratio"),
        ({"ratio": "[1:1]", "slstm_at": (1,)}, "both select the sLSTM blocks; set only one"),
        ({"slstm_at": (4,)}, r"slstm_at=\(4,\): expected distinct indices from 0 to .* = 3"),
        ({"slstm_at": (1, 1)}, r"slstm_at=\(1, 1\): expected distinct indices"),
        (
            {"ratio": "[0:1]", "num_heads": 3},
            "num_heads=3 does not divide model.embedding_dim=128, which sLSTM blocks require",
        ),
        (
            {"slstm_forget_gate": "linear"},
            "slstm_forget_gate='linear' is unknown; expected one of sigmoid, exponential",
        ),
        ({"remat": "all"}, "remat='all' is unknown; expected one of none, dots, block"),
        (
            {"matmul_precision": "tf32"},
            "matmul_precision='tf32' is unknown; expected one of default, high, highest",
        ),
        ({"dtype": "float16"}, "dtype='float16' is unknown; expected one of float32, bfloat16"),
    ],
)
def test_values_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


_MODELS = {
    "default": ModelConfig(),
    "narrow": ModelConfig(vocab_size=2, embedding_dim=8, num_blocks=1, num_heads=2),
    "2024": ModelConfig(block="xlstm_2024", vocab_size=7, embedding_dim=16, num_heads=2),
    "mixed": ModelConfig(embedding_dim=32, num_blocks=8, ratio="[3:1]"),
    "all slstm": ModelConfig(vocab_size=3, embedding_dim=8, num_blocks=2, slstm_at=(0, 1)),
}


def _num_params(model):
    init = xLSTMLMModel(LanguageModelConfig(model)).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", _MODELS)
def test_a_model_is_as_large_as_it_says(name):
    model = _MODELS[name]
    check_sizes(dataclasses.asdict(model), _num_params(model))
    check_sizes({"unknown": 10**99}, _num_params(ModelConfig()))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_blocks", 10**6),
        ("num_blocks", 10**4000),
        ("vocab_size", 10**12),
        ("embedding_dim", 10**9),
        ("embedding_dim", 10**400),
        ("ffn_round_up_to_multiple_of", 10**9),
        ("conv_width", 10**9),
        ("num_heads", 10**9),
        ("ffn_proj_factor", 1e308),
        ("inner_dim_factor", 10**400),
        ("qk_dim_factor", math.inf),
    ],
)
def test_what_is_larger_is_named_at_once(name, value):
    fields = dataclasses.asdict(ModelConfig()) | {name: value}
    num_lines, num_bytes = 0, 0

    def count(*_):
        nonlocal num_lines
        num_lines += 1
        return count

    with pytest.raises(ValueError, match=f"^{name}=.* hold 1,000,000 numbers at most$") as caught:
        tracemalloc.start()
        tracing = sys.gettrace()
        sys.settrace(count)
        try:
            check_sizes(fields, 1_000_000)
        finally:
            sys.settrace(tracing)
            _, num_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert len(str(caught.value)) < 200
    # It does nothing as often, and builds nothing as large, as the model is.
    assert num_lines < 2000 and num_bytes < 100_000


def test_what_is_no_size_is_left_to_others():
    strange = {name: None for name in ("vocab_size", "embedding_dim", "num_blocks")}
    check_sizes(strange | {"qk_dim_factor": "x", "num_heads": [1], "dtype": 10**99}, 10**6)
    check_sizes({"vocab_size": -(10**99), "qk_dim_factor": math.nan, "scan_unroll": 10**9}, 10**6)
