import json
import math
import os

import pytest
from safetensors import safe_open

from xlstm.huggingface.layout import (
    describe_ignored_fields,
    from_hf_config,
    hf_tensors,
    parameter_shapes,
    to_hf_config,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig

FOLDER = os.path.join(os.path.dirname(__file__), "testdata", "hf_xlstm_tiny")

_ENOUGH = 10**9  # Elements in the files of a model, at least.


@pytest.fixture(scope="module")
def hf_config():
    """The content of a `config.json` that `transformers` wrote."""
    with open(os.path.join(FOLDER, "config.json")) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def shapes(hf_config):
    model, _ = from_hf_config(hf_config, _ENOUGH)
    return parameter_shapes(model)


def test_the_tensors_are_those_of_a_hugging_face_model(shapes):
    with safe_open(os.path.join(FOLDER, "model.safetensors"), framework="numpy") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    tensors = hf_tensors(shapes)
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(tensors) == len(expected)


def test_every_parameter_is_covered_once(shapes):
    covered = {path: [] for path in shapes}
    for tensor in hf_tensors(shapes):
        shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
        assert shape == shapes[tensor.parameter][len(shapes[tensor.parameter]) - len(shape) :]
        assert tensor.size == math.prod(shape)
        covered[tensor.parameter].append(tensor.block)
    for path, blocks in covered.items():
        assert blocks == (list(range(2)) if path.startswith("blocks.") else [None])


def test_the_largest_published_size():
    """Allocates nothing."""
    model = ModelConfig(vocab_size=50304, embedding_dim=4096, num_blocks=32, num_heads=8)
    tensors = hf_tensors(parameter_shapes(model))
    assert sum(tensor.size for tensor in tensors) == 6_865_424_896
    assert {t.shape for t in tensors if t.name.endswith("ffn.proj_up.weight")} == {(10944, 4096)}


def test_a_hugging_face_configuration(hf_config):
    model, backend = from_hf_config(hf_config, _ENOUGH)
    sizes = (model.vocab_size, model.embedding_dim, model.num_blocks, model.num_heads)
    assert sizes == (61, 128, 2, 4)
    assert (model.ffn_dim, model.gate_soft_cap, model.output_logit_soft_cap) == (128, 15.0, 30.0)
    assert backend == BackendConfig(chunk_size=16)
    # The round trip keeps all fields but those that only `transformers` uses,
    ours = to_hf_config(model, backend, "float32")
    others = {"bos_token_id", "eos_token_id", "pad_token_id"}
    others |= {"transformers_version", "max_inference_chunksize"}
    # and those that have no effect.
    others |= {"tie_word_embeddings", "add_out_norm", "return_last_states"}
    others |= {"chunkwise_kernel", "sequence_kernel", "step_kernel", "inference_state_dtype"}
    assert ours == {name: value for name, value in hf_config.items() if name not in others}


def test_a_configuration_of_ours_comes_back():
    model = ModelConfig(
        vocab_size=300,
        embedding_dim=48,
        num_blocks=3,
        num_heads=2,
        qk_dim_factor=0.75,
        v_dim_factor=2.0,
        ffn_proj_factor=1.5,
        ffn_round_up_to_multiple_of=7,
        gate_soft_cap=4.5,
        output_logit_soft_cap=3.0,
        norm_eps=1e-3,
    )
    backend = BackendConfig(chunk_size=24)
    hf_config = json.loads(json.dumps(to_hf_config(model, backend, "bfloat16")))
    assert hf_config["dtype"] == "bfloat16"
    assert from_hf_config(hf_config, _ENOUGH) == (model, backend)


def test_what_may_be_left_out(hf_config):
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_heads")
    model, backend = from_hf_config({name: hf_config[name] for name in sizes} | {"new": 1}, _ENOUGH)
    assert model == ModelConfig(vocab_size=61, embedding_dim=128, num_blocks=2, num_heads=4)
    assert backend == BackendConfig()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported, only 'xlstm'"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not supported"),
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"add_out_norm": None}, "add_out_norm=None is not supported: expected bool"),
        ({"weight_mode": "fused"}, "weight_mode='fused' is not supported, only 'single'"),
        ({"norm_reduction_force_float32": False}, "norm_reduction_force_float32=False"),
        ({"eps": 0.01}, "eps=0.01 is not supported, only 0 to 1e-06"),
        ({"eps": None}, "eps=None is not supported: expected float"),
        ({"embedding_dim": 64}, "embedding_dim=64 and hidden_size=128 contradict"),
        ({"num_hidden_layers": 3}, "num_blocks=2 and num_hidden_layers=3 contradict"),
        ({"num_heads": 3}, "num_heads=3 does not divide qk_dim = 64"),
        ({"num_heads": "4"}, "num_heads='4' is not supported: expected int"),
        ({"num_heads": True}, "num_heads=True is not supported: expected int"),
        ({"num_heads": None}, "num_heads is None: expected a number"),
        ({"vocab_size": 61.0}, "vocab_size=61.0 is not supported: expected int"),
        ({"gate_soft_cap": None}, "gate_soft_cap is None: expected a number"),
        ({"output_logit_soft_cap": 0}, "output_logit_soft_cap=0.0 is not supported: it must"),
        ({"ffn_proj_factor": [2]}, r"ffn_proj_factor=\[2\] is not supported: expected float"),
        ({"chunk_size": "16"}, "chunk_size='16' is not supported: expected int"),
    ],
    ids=str,
)
def test_what_ours_cannot_be(hf_config, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(hf_config | changes, _ENOUGH)


def test_demands_that_change_nothing(hf_config):
    assert describe_ignored_fields(hf_config) == describe_ignored_fields({}) == ()
    changed = hf_config | {"tie_word_embeddings": True, "add_out_norm": False}
    assert from_hf_config(changed, _ENOUGH) == from_hf_config(hf_config, _ENOUGH)
    assert describe_ignored_fields(changed) == (
        "tie_word_embeddings=True has no effect, as in transformers 5: lm_head.weight is used",
        "add_out_norm=False has no effect, as in transformers 5: backbone.out_norm.weight is used",
    )


# The head sizes of the states in the layers and in the cache of `transformers`.
@pytest.mark.parametrize(
    "sizes, layers, cache",
    [
        ((32, 4, 0.5, 1.0), (4, 8), (16, 16)),
        ((64, 4, 0.5, 1.0), (8, 16), (16, 16)),
        ((64, 4, 1.0, 1.0), (16, 16), (16, 16)),
        ((96, 4, 1.0, 2.0), (24, 48), (32, 48)),
        ((96, 6, 0.5, 1.0), (8, 16), (10, 21)),
        ((120, 60, 0.5, 1.0), (1, 2), (1, 2)),
        ((128, 4, 0.75, 1.0), (24, 32), (32, 32)),
        ((128, 8, 0.5, 1.0), (8, 16), (8, 16)),
        ((192, 2, 2 / 3, 1 / 3), (64, 32), (64, 32)),
        ((192, 4, 0.5, 1.0), (24, 48), (32, 48)),
        ((512, 4, 0.5, 1.0), (64, 128), (64, 128)),
    ],
    ids=str,
)
def test_the_cache_of_transformers_fits(sizes, layers, cache):
    width, heads, qk_dim_factor, v_dim_factor = sizes
    model = ModelConfig(
        embedding_dim=width,
        num_heads=heads,
        qk_dim_factor=qk_dim_factor,
        v_dim_factor=v_dim_factor,
    )
    hf_config = to_hf_config(model, BackendConfig(), "float32")
    assert ("attribute_map" in hf_config) == (layers != cache)
    names = hf_config.get("attribute_map", {})
    computed = dict(zip(("qk_head_dim", "v_head_dim"), cache, strict=True))
    found = [hf_config[names[name]] if name in names else computed[name] for name in computed]
    assert tuple(found) == layers
    assert from_hf_config(hf_config, _ENOUGH) == (model, BackendConfig(chunk_size=64))


def test_a_size_that_is_missing(hf_config):
    without = {x: y for x, y in hf_config.items() if x not in ("hidden_size", "embedding_dim")}
    with pytest.raises(ValueError, match="embedding_dim is missing: expected a number"):
        from_hf_config(without, _ENOUGH)


def test_what_the_hugging_face_format_does_not_support():
    with pytest.raises(ValueError, match="does not support .*stabilize_correctly=False"):
        to_hf_config(ModelConfig(), BackendConfig(stabilize_correctly=False), "float32")
    with pytest.raises(ValueError, match="does not support model.block=xlstm_2024"):
        to_hf_config(ModelConfig(block="xlstm_2024"), BackendConfig(), "float32")
    with pytest.raises(ValueError, match="does not support sLSTM blocks"):
        to_hf_config(ModelConfig(slstm_at=(1,)), BackendConfig(), "float32")
    with pytest.raises(ValueError, match="gate_soft_cap=0.0 is not supported"):
        to_hf_config(ModelConfig(gate_soft_cap=0.0), BackendConfig(), "float32")


def test_an_export_has_a_positive_chunk_size():
    for size in (-1, 0):
        backend = BackendConfig(chunk_size=size)
        assert to_hf_config(ModelConfig(), backend, "float32")["chunk_size"] == 64
