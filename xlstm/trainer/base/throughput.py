"""How fast training is, and how fast it could be."""

import time

import jax
import jax.numpy as jnp

_MATMUL_SIZE = {"cpu": 2048}  # On other platforms:
_LARGE_MATMUL_SIZE = 8192


@jax.jit
def _matmul(x: jax.Array) -> jax.Array:
    return x @ x


def measure_matmul_rate(dtype: jnp.dtype, seconds: float = 0.5) -> float:
    """Measures the rate of a large dense matmul: what a training step could reach at best.

    Args:
        dtype: Type of the matrices.
        seconds: How long to measure.

    Returns:
        Floating-point operations a second, of all devices together. Devices that are simulated on
        one CPU share its cores, so there the rate is that of one of them.
    """
    platform = jax.default_backend()
    size = _MATMUL_SIZE.get(platform, _LARGE_MATMUL_SIZE)
    device = jax.local_devices()[0]
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    _matmul(x).block_until_ready()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        _matmul(x).block_until_ready()
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
