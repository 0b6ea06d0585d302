import jax
import jax.numpy as jnp
import pytest

from xlstm.testing.lowered_products import gpu_products
from xlstm.trainer.base import throughput
from xlstm.trainer.base.throughput import measure_matmul_rate, peak_flops


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_rate_is_plausible(dtype):
    assert 1e8 < measure_matmul_rate(dtype, seconds=0.0) < 1e16


@pytest.mark.parametrize(
    "dtype, asked", [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")], ids=str
)
def test_random_numbers_are_multiplied_as_exactly_as_asked(monkeypatch, dtype, asked):
    calls, matmul = [], throughput._matmul
    monkeypatch.setattr(throughput, "_matmul", lambda *args: calls.append(args) or matmul(*args))
    monkeypatch.setitem(throughput._MATMUL_SIZE, "cpu", 256)
    measure_matmul_rate(dtype, jax.lax.Precision.HIGHEST, seconds=0.0)
    for x, precision in calls:
        assert x.dtype == dtype and abs(float(jnp.std(x.astype(jnp.float32))) - 1) < 0.02
        with jax.default_matmul_precision(None):
            (product,) = gpu_products(matmul.trace(x, precision))
        assert product.precisions == (asked, asked)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "kind, expected",
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None)],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, kind, expected):
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops() == (None if expected is None else 4 * expected)
