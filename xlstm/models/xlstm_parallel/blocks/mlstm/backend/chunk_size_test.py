import jax
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import fwbw, testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    Device,
    current_device,
    default_chunk_size,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import backend_config

CPU, GPU, TPU = Device("cpu", "cpu"), Device("gpu", "NVIDIA A100"), Device("tpu", "TPU v5e")


@pytest.mark.parametrize(
    ("device", "qk_dim", "v_dim", "expected"),
    [
        (CPU, 16, 32, 32),
        (CPU, 64, 64, 32),
        (CPU, 64, 128, 64),
        (CPU, 128, 64, 64),
        (CPU, 128, 256, 128),
        (CPU, 1024, 1024, 128),
        (GPU, 64, 128, 64),
        (GPU, 128, 256, 128),
        (GPU, 256, 512, 256),
        (TPU, 64, 128, 64),
        (TPU, 256, 512, 256),
        (Device("cuda", "NVIDIA A100"), 256, 512, 256),
    ],
)
def test_the_default_depends_on_the_device_and_the_largest_head(device, qk_dim, v_dim, expected):
    assert default_chunk_size(device, qk_dim, v_dim) == expected


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("qk_dim, v_dim", [(8, 16), (256, 512)])
def test_a_model_takes_the_default_at_the_call(monkeypatch, device, qk_dim, v_dim):
    monkeypatch.setattr(fwbw, "current_device", lambda: device)
    config = backend_config(BackendConfig())
    arguments = testing.random_arguments(0, (1,), 257, qk_dim=qk_dim, v_dim=v_dim)
    _, ctx = jax.eval_shape(lambda *x: fwbw.fwbw_forward(*x, config), *arguments[:5])
    assert ctx.h.shape[2] == default_chunk_size(device, qk_dim, v_dim)


def test_the_backward_pass_takes_the_chunks_of_the_forward_pass(monkeypatch):
    config = backend_config(BackendConfig())
    arguments = testing.random_arguments(0, (1,), 65)
    _, ctx = jax.eval_shape(lambda *x: fwbw.fwbw_forward(*x, config), *arguments[:5])
    monkeypatch.setattr(fwbw, "current_device", lambda: GPU)
    assert ctx.chunk_size != min(65, default_chunk_size(GPU, 4, 6))
    gradients = jax.eval_shape(lambda *x: fwbw.fwbw_backward(*x, config), ctx, arguments.v)
    assert [x.shape for x in gradients[:5]] == [x.shape for x in arguments[:5]]


@pytest.mark.parametrize(("given", "taken"), [(-1, -1), (0, None), (48, 48)])
def test_how_the_options_of_a_model_become_those_of_fwbw(given, taken):
    assert backend_config(BackendConfig(chunk_size=given)).chunk_size == taken


def test_the_default_is_that_of_its_number():
    arguments = testing.random_arguments(0, (1,), 65, with_state=False)
    size = default_chunk_size(current_device(), 4, 6)
    results = (
        jax.jit(fwbw.mlstm_fwbw_custom_grad(fwbw.mLSTMBackendFwbwConfig(chunk_size)))(
            *arguments[:5]
        )
        for chunk_size in (-1, size)
    )
    assert len({x.tobytes() for x in results}) == 1
