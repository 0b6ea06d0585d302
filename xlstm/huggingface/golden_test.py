"""Tests of logits and a greedy continuation against those that `transformers` computed."""

import json
import os

import flax
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from xlstm.huggingface.layout import from_hf_config, hf_tensors, parameter_shapes
from xlstm.inference.decode import generate
from xlstm.inference.sampling import SamplingConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel

FOLDER = os.path.join(os.path.dirname(__file__), "testdata", "hf_xlstm_tiny")

_ENOUGH = 10**9  # Elements in the files of a model, at least.


@pytest.fixture(scope="module")
def model_config():
    with open(os.path.join(FOLDER, "config.json")) as file:
        model, _ = from_hf_config(json.load(file), _ENOUGH)
    return model


@pytest.fixture(scope="module")
def params(model_config):
    """The parameters by our names, from all tensors of the file."""
    arrays = load_file(os.path.join(FOLDER, "model.safetensors"))
    shapes = parameter_shapes(model_config)
    slices = {path: [] for path in shapes}
    for tensor in hf_tensors(shapes):
        array = arrays.pop(tensor.name)
        slices[tensor.parameter].append(array.T if tensor.is_transposed else array)
    assert not arrays
    stacked = {path: np.stack(x).reshape(shapes[path]) for path, x in slices.items()}
    return flax.traverse_util.unflatten_dict(stacked, sep=".")


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
    apply = jax.jit(xLSTMLMModel(config).apply)
    logits = apply({"params": params}, expected["ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-4)


def test_greedy_continuation(model_config, params, expected):
    config = LanguageModelConfig(model_config, BackendConfig("fwbw", 8))
    prompt, continuation = expected["ids"][:, :13], expected["gen"]
    # The recorded continuation starts with the prompt.
    np.testing.assert_array_equal(continuation[:, :13], prompt)
    tokens = generate(
        params,
        prompt,
        jax.random.key(0),
        config=config,
        max_tokens=continuation.shape[1] - 13,
        sampling=SamplingConfig(temperature=0.0),
    )
    np.testing.assert_array_equal(tokens, continuation[:, 13:])
