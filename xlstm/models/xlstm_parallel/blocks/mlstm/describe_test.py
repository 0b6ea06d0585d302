from typing import NamedTuple

import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import mlstm_line, model_implementation
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig


class FakeDevice(NamedTuple):
    platform: str
    device_kind: str


CPU = FakeDevice("cpu", "cpu")
H100 = FakeDevice("gpu", "NVIDIA H100 80GB HBM3")


def config(backend=None, **model):
    return LanguageModelConfig(ModelConfig(**model), backend or BackendConfig())


def test_a_hopper_gpu_takes_the_kernels():
    line = mlstm_line(config(dtype="bfloat16"), H100)
    assert line == "mLSTM: mosaic kernels, chunks of 64 tokens"


@pytest.mark.parametrize(
    "device, model, reason",
    [
        (CPU, {"dtype": "bfloat16"}, "the device is cpu"),
        (H100, {"dtype": "float32"}, "they are"),
        (H100, {"dtype": "bfloat16", "num_heads": 1, "embedding_dim": 1024}, "DHV=1024"),
        (H100, {"dtype": "bfloat16", "block": "xlstm_2024", "embedding_dim": 2048}, "DHQK=1024"),
    ],
)
def test_the_xla_program_is_taken_for_a_reason(device, model, reason):
    line = mlstm_line(config(BackendConfig(chunk_size=32), **model), device)
    assert line.startswith("mLSTM: XLA program, chunks of 32 tokens (not mosaic: it needs ")
    assert line.endswith(")") and reason in line


def test_a_program_that_was_asked_for_needs_no_reason():
    backend = BackendConfig(implementation="xla", chunk_size=0)
    assert mlstm_line(config(backend), CPU) == "mLSTM: XLA program, one chunk"


def test_the_default_chunk_size_is_that_of_the_device():
    model = config(BackendConfig(implementation="xla"), embedding_dim=2048, num_heads=4)
    assert mlstm_line(model, H100) == "mLSTM: XLA program, chunks of 256 tokens"
    assert mlstm_line(model, CPU) == "mLSTM: XLA program, chunks of 128 tokens"


def test_kernels_that_cannot_run_are_an_error():
    with pytest.raises(ValueError, match="backend.implementation=mosaic cannot be used: .* cpu"):
        model_implementation(config(BackendConfig(implementation="mosaic")), CPU)


@pytest.mark.parametrize(
    "other",
    [
        config(BackendConfig(name="recurrent", implementation="mosaic")),
        config(BackendConfig(implementation="mosaic"), slstm_at=(0, 1, 2, 3)),
    ],
)
def test_models_without_fwbw_have_no_implementation(other):
    assert model_implementation(other, CPU) is None
    assert mlstm_line(other, CPU) == ""
