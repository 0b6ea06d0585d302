import dataclasses
import math
import time

import pytest

from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.models.xlstm_parallel.hf_layout import parameter_shapes
from xlstm.models.xlstm_parallel.sizes import check_sizes

_MODELS = {
    "default": ModelConfig(),
    "narrow": ModelConfig(vocab_size=2, embedding_dim=8, num_blocks=1, num_heads=2),
    "2024": ModelConfig(block="xlstm_2024", vocab_size=7, embedding_dim=16, num_heads=2),
    "mixed": ModelConfig(embedding_dim=32, num_blocks=8, ratio="[3:1]"),
    "all slstm": ModelConfig(vocab_size=3, embedding_dim=8, num_blocks=2, slstm_at=(0, 1)),
}


@pytest.mark.parametrize("name", _MODELS)
def test_a_model_is_as_large_as_it_says(name):
    model = _MODELS[name]
    num_parameters = sum(map(math.prod, parameter_shapes(model).values()))
    check_sizes(dataclasses.asdict(model), num_parameters)
    check_sizes({"unknown": 10**99}, sum(map(math.prod, parameter_shapes(ModelConfig()).values())))


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
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"^{name}=.* hold 1,000,000 numbers at most$") as caught:
        check_sizes(dataclasses.asdict(ModelConfig()) | {name: value}, 1_000_000)
    assert len(str(caught.value)) < 200
    assert time.perf_counter() - begin < 0.5


def test_what_is_no_size_is_left_to_others():
    strange = {name: None for name in ("vocab_size", "embedding_dim", "num_blocks")}
    check_sizes(strange | {"qk_dim_factor": "x", "num_heads": [1], "dtype": 10**99}, 10**6)
    check_sizes({"vocab_size": -(10**99), "qk_dim_factor": math.nan, "scan_unroll": 10**9}, 10**6)
