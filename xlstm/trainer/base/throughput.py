"""Measured and promised rates of the devices, which training is compared with."""

import functools
import time

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.precision import product_precision

_MATMUL_SIZE = {"cpu": 2048}
_LARGE_MATMUL_SIZE = 8192  # On all other platforms.


@functools.partial(jax.jit, static_argnames="precision")
def _matmul(x: jax.Array, precision: lax.Precision | None) -> jax.Array:
    return jnp.matmul(x, x, precision=product_precision(precision, x))


def measure_matmul_rate(
    dtype: jnp.dtype, precision: lax.Precision | None = None, seconds: float = 0.5
) -> float:
    """Measures the rate of a large dense matmul, an upper bound for a training step.

    The matrix is random, since a GPU multiplies constant matrices faster (856 instead of 710
    TFLOP/s for ones, on an H100 in bfloat16).

    Args:
        dtype: Type of the matrices.
        precision: Precision of float32 products, see `product_precision`; should be that of the
            model that is compared with the rate (float32 or TF32).
        seconds: How long to measure.

    Returns:
        Floating-point operations per second of all devices together. Devices simulated on one CPU
        share its cores, so they count as one.
    """
    platform = jax.default_backend()
    size = _MATMUL_SIZE.get(platform, _LARGE_MATMUL_SIZE)
    device = jax.local_devices()[0]
    # The key is on the device, so the matrix is created there.
    x = jax.random.normal(jax.device_put(jax.random.key(0), device), (size, size), dtype)
    _matmul(x, precision).block_until_ready()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        _matmul(x, precision).block_until_ready()
        times.append(time.perf_counter() - begin)
    median = sorted(times)[len(times) // 2]
    return 2 * size**3 / median * (jax.process_count() if platform == "cpu" else jax.device_count())


# Dense bfloat16 operations per second of one device, from the vendors' data sheets.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
    """Returns the data sheet's bfloat16 FLOP/s of all devices together; None if unknown."""
    kind = jax.devices()[0].device_kind
    for name, rate in _PEAK_FLOPS.items():
        if name in kind:
            return rate * jax.device_count()
    return None
