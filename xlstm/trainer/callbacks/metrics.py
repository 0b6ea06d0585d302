"""Brings metrics to the host and to the loggers."""

import math

import jax

from xlstm.common_types import Metrics, TrainState
from xlstm.trainer.base.callback import Callback
from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.logger.base_logger import Loggers


def fetch_metrics(step: int, metrics: Metrics) -> dict[str, float]:
    """Waits for a step's metrics.

    Args:
        step: The step, for the message.
        metrics: Scalars, or pairs (sum, count).

    Returns:
        The metrics as numbers; a pair becomes its mean.

    Raises:
        ValueError: If one of them is not finite.
    """
    row = {}
    for name, value in jax.device_get(metrics).items():
        row[name] = float(value[0] / value[1]) if isinstance(value, tuple) else float(value)
    bad = [f"{name}={value}" for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"training diverged at step {step} ({', '.join(bad)}): lower schedule.peak_lr or"
            " optimizer.grad_clip_norm; checkpoints up to the step before are good"
        )
    return row


class MetricsCallback(Callback):
    """Logs the metrics and the speed of every so many steps."""

    def __init__(
        self,
        loggers: Loggers,
        throughput: Throughput,
        *,
        interval: int,
        tokens_per_step: int,
        flops_per_token: int,
        matmul_rate: float,
        constants: dict[str, float],
    ):
        """Makes the callback.

        Args:
            loggers: Where rows go.
            throughput: The clock, which other callbacks pause.
            interval: Steps between rows.
            tokens_per_step: Tokens in a global batch.
            flops_per_token: Useful floating-point operations a token.
            matmul_rate: What a dense matmul reaches, in operations a second.
            constants: What else belongs into every row.
        """
        self._loggers, self._throughput = loggers, throughput
        self._interval, self._tokens_per_step = interval, tokens_per_step
        self._matmul_fraction = flops_per_token / matmul_rate
        self._constants = constants

    def on_start(self, step: int, state: TrainState) -> None:
        """Starts the clock."""
        self._throughput.lap()

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Logs a row if its turn has come."""
        self._throughput.add(self._tokens_per_step)
        self._loggers.progress(step)
        if step % self._interval:
            return
        row = fetch_metrics(step, metrics)
        speed = self._throughput.lap()
        row |= {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": speed,
            "matmul_fraction": speed * self._matmul_fraction,
            **self._constants,
        }
        self._loggers.log(step, row)
