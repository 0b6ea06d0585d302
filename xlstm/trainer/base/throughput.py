"""How fast training is, and how fast it could be."""

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree

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


class Throughput:
    """Counts tokens over time, pauses left out."""

    def __init__(self):
        """Starts the clock."""
        self._start, self._paused, self._tokens = time.perf_counter(), 0.0, 0

    def add(self, tokens: int) -> None:
        """Counts tokens that were trained on."""
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self, pending: PyTree) -> Iterator[None]:
        """Leaves the time spent inside out: evaluation, say.

        Args:
            pending: What the steps before are still computing; that time is not left out.
        """
        jax.block_until_ready(pending)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def lap(self) -> float:
        """Returns tokens per second since the lap before, and begins a new one."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start - self._paused, 1e-9)
        self._start, self._paused, self._tokens = now, 0.0, 0
        return rate
