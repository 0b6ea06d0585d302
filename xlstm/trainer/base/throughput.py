"""How fast training is, and how fast it could be."""

import functools
import time

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.shared.precision import product_precision

_MATMUL_SIZE = {"cpu": 2048}  # On other platforms:
_LARGE_MATMUL_SIZE = 8192


@functools.partial(jax.jit, static_argnames="precision")
def _matmul(x: jax.Array, precision: lax.Precision | None) -> jax.Array:
    return jnp.matmul(x, x, precision=product_precision(precision, x))


def measure_matmul_rate(
    dtype: jnp.dtype, precision: lax.Precision | None = None, seconds: float = 0.5
) -> float:
    """Measures the rate of a large dense matmul: what a training step could reach at best.

    The matrix is random: a GPU multiplies ones faster than real numbers (856 instead of 710 TFLOP/s
    on an H100, in bfloat16).

    Args:
        dtype: Type of the matrices.
        precision: How exactly float32 is multiplied, see `product_precision`. What is measured
            beside it should multiply alike: of a model that multiplies in float32 the yardstick
            does so too, and not in TF32.
        seconds: How long to measure.

    Returns:
        Floating-point operations a second, of all devices together. Devices that are simulated on
        one CPU share its cores, so there the rate is that of one of them.
    """
    platform = jax.default_backend()
    size = _MATMUL_SIZE.get(platform, _LARGE_MATMUL_SIZE)
    device = jax.local_devices()[0]
    # Made where it is used: the key is there.
    x = jax.random.normal(jax.device_put(jax.random.key(0), device), (size, size), dtype)
    _matmul(x, precision).block_until_ready()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        _matmul(x, precision).block_until_ready()
        times.append(time.perf_counter() - begin)
    median = sorted(times)[len(times) // 2]
    return 2 * size**3 / median * (jax.process_count() if platform == "cpu" else jax.device_count())


# Dense bfloat16 operations a second of one device, by the makers' data sheets.
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
    """What the data sheet promises of all devices together, in bfloat16; None if unknown."""
    kind = jax.devices()[0].device_kind
    for name, rate in _PEAK_FLOPS.items():
        if name in kind:
            return rate * jax.device_count()
    return None
