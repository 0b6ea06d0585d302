import jax
import jax.numpy as jnp
import pytest

from xlstm.trainer.base.throughput import measure_matmul_rate, peak_flops


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_rate_is_plausible(dtype):
    assert 1e8 < measure_matmul_rate(dtype, seconds=0.0) < 1e16


@pytest.mark.parametrize(
    "kind, expected",
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None)],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, kind, expected):
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops() == (None if expected is None else 4 * expected)
