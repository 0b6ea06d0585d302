"""A random checkpoint of the public format, and what the public implementation made of it."""

import json
import os

import jax
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.generate import generate
from xlstm.models.xlstm_parallel.sampling import SamplingConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.testing.quick_compilation import QUICK_COMPILATION

FOLDER = os.path.join(os.path.dirname(__file__), "testdata", "hf_xlstm_tiny")


def read_safetensors(path):
    """Returns the float32 arrays of a file: its header's length, the header, then raw data."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    del header["__metadata__"]
    arrays = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(data[start:end], np.float32).reshape(entry["shape"])
    return arrays


def to_our_tree(arrays, num_blocks):
    """Renames, transposes the kernels, stacks the blocks; every array has to be used."""
    arrays = dict(arrays)

    def take(name):
        array = arrays.pop(name)
        if name.endswith("embeddings.weight"):
            return {"embedding": array}
        if name.endswith(".bias"):
            return {"bias": array}
        return {"kernel": array.T} if array.ndim == 2 else {"scale": array}

    def layer(path):
        blocks = []
        for block in range(num_blocks):
            name = f"backbone.blocks.{block}.{path}"
            has_bias = f"{name}.bias" in arrays
            blocks.append(take(f"{name}.weight") | (take(f"{name}.bias") if has_bias else {}))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    cell = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
    params = {
        "embeddings": take("backbone.embeddings.weight"),
        "blocks": {
            "norm_mlstm": layer("norm_mlstm"),
            "mlstm_layer": {
                name: layer(f"mlstm_layer.{name}") for name in (*cell, "multihead_norm", "out_proj")
            },
            "norm_ffn": layer("norm_ffn"),
            "ffn": {
                name: layer(f"ffn.{name}") for name in ("proj_up_gate", "proj_up", "proj_down")
            },
        },
        "out_norm": take("backbone.out_norm.weight"),
        "lm_head": take("lm_head.weight"),
    }
    assert not arrays
    return params


@pytest.fixture(scope="module")
def model_config():
    with open(os.path.join(FOLDER, "config.json")) as file:
        published = json.load(file)
    names = ("vocab_size", "embedding_dim", "num_blocks", "num_heads", "qk_dim_factor")
    names += ("v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of")
    names += ("gate_soft_cap", "output_logit_soft_cap", "norm_eps")
    return ModelConfig(**{name: published[name] for name in names})


@pytest.fixture(scope="module")
def params(model_config):
    path = os.path.join(FOLDER, "model.safetensors")
    return to_our_tree(read_safetensors(path), model_config.num_blocks)


@pytest.fixture(scope="module")
def expected():
    with np.load(os.path.join(FOLDER, "expected.npz")) as file:
        return dict(file)


@pytest.mark.parametrize(
    ("backend", "chunk_size"),
    [("fwbw", 64), ("fwbw", 7), ("fwbw", 0), ("parallel_stabilized", 0), ("recurrent", 0)],
)
def test_logits(backend, chunk_size, model_config, params, expected):
    config = LanguageModelConfig(model_config, BackendConfig(backend, chunk_size))
    apply = jax.jit(xLSTMLMModel(config).apply, compiler_options=QUICK_COMPILATION)
    logits = apply({"params": params}, expected["ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-4)


def test_greedy_continuation(model_config, params, expected):
    config = LanguageModelConfig(model_config, BackendConfig("fwbw", 8))
    prompt, continuation = expected["ids"][:, :13], expected["gen"]
    # The recorded continuation holds the prompt first.
    np.testing.assert_array_equal(continuation[:, :13], prompt)
    tokens = generate(
        params,
        prompt,
        jax.random.key(0),
        config=config,
        num_tokens=continuation.shape[1] - 13,
        sampling=SamplingConfig(temperature=0.0),
    )
    np.testing.assert_array_equal(tokens, continuation[:, 13:])
