"""The callback that hands metrics and speeds to the loggers."""

import math
import resource
import sys
from collections.abc import Callable

import jax

from xlstm.common_types import TrainState
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.steady_output import is_output_lost
from xlstm.trainer.base.throughput import peak_flops
from xlstm.trainer.base.trainer import Callback
from xlstm.trainer.logger.base_logger import Logger

# Metrics of the machine, not of the training: they differ when a run is repeated.
SPEEDS = frozenset(
    {
        "tokens_per_second",
        "tokens_per_second_per_device",
        "matmul_fraction",
        "mfu",
        "goodput",
        "peak_memory",
        "peak_device_memory",
        "terminal_lost",
    }
)
# Metrics for the trainer itself.
_NOT_LOGGED = ("request", "skipped")


class MetricsCallback(Callback):
    """A callback that logs metrics and speed at an interval, and every skipped step."""

    def __init__(
        self,
        logger: Logger,
        clock: Clock,
        *,
        interval: int,
        tokens_before: Callable[[int], int],
        flops_per_token: int,
        matmul_rate: float,
        constants: dict[str, float],
    ):
        """Makes the callback.

        Args:
            logger: Takes the metrics.
            clock: The run's clock.
            interval: Steps between logged metrics.
            tokens_before: Returns the number of tokens that a number of steps have seen.
            flops_per_token: Useful floating-point operations per token.
            matmul_rate: FLOP/s of a dense matmul on all devices together.
            constants: Further metrics to log each time.
        """
        self._logger, self._clock, self._interval = logger, clock, interval
        self._tokens_before, self._flops_per_token = tokens_before, flops_per_token
        self._rates = {"matmul_fraction": matmul_rate}
        peak = peak_flops()
        if peak:
            self._rates["mfu"] = peak
        self._constants = constants
        self._last_tokens, self._last_seconds = 0, 0.0

    def on_start(self, step: int, state: TrainState) -> None:
        """Starts counting tokens and seconds."""
        self._last_tokens = self._tokens_before(step)
        self._last_seconds = self._clock.training_seconds()

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics if they are due."""
        self._logger.progress(step)
        if step % self._interval == 0:
            scalars = metrics | self._speed(step) | device_memory() | self._constants
            scalars |= {"terminal_lost": 1} if is_output_lost() else {}
        elif metrics.get("skipped"):
            scalars = metrics
        else:
            return
        self._logger.log(
            step,
            {
                name: value
                for name, value in scalars.items()
                # JSON has no infinity or NaN; `skipped_steps` records such steps.
                if name not in _NOT_LOGGED and math.isfinite(value)
            },
        )

    def _speed(self, step: int) -> dict[str, float]:
        tokens, seconds = self._tokens_before(step), self._clock.training_seconds()
        speed = (tokens - self._last_tokens) / max(seconds - self._last_seconds, 1e-9)
        self._last_tokens, self._last_seconds = tokens, seconds
        return {
            "tokens": tokens,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / jax.device_count(),
            **{name: speed * self._flops_per_token / rate for name, rate in self._rates.items()},
            "goodput": self._clock.goodput(),
        }


def device_memory() -> dict[str, float]:
    """Returns the peak memory in GiB: of a device, or of the process on a CPU."""
    peak = peak_device_bytes()
    if peak is not None:
        return {"peak_device_memory": peak / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def peak_device_bytes() -> int | None:
    """Returns the peak memory of a device in bytes; None if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
