"""Evaluates the model during training."""

import math
from collections.abc import Callable

from xlstm.common_types import Metrics, TrainState
from xlstm.trainer.base.callback import Callback
from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.metrics import fetch_metrics
from xlstm.trainer.logger.base_logger import Loggers


class EvaluateCallback(Callback):
    """Logs the validation loss before the first step, every so many steps, and at the end."""

    def __init__(
        self,
        evaluate: Callable[[TrainState], float],
        loggers: Loggers,
        throughput: Throughput,
        interval: int,
    ):
        """Makes the callback.

        Args:
            evaluate: Computes the validation loss, in nats a token, from a state.
            loggers: Where rows go.
            throughput: The clock, paused during an evaluation.
            interval: Steps between evaluations.
        """
        self._evaluate, self._loggers = evaluate, loggers
        self._throughput, self._interval = throughput, interval
        self._last = None

    def on_start(self, step: int, state: TrainState) -> None:
        """Evaluates the initial parameters; a run that goes on has done so already."""
        if step == 0:
            self._log(step, state)
        self._last = step

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Evaluates if its turn has come."""
        if step % self._interval == 0:
            self._log(step, state)

    def on_end(self, step: int, state: TrainState) -> None:
        """Evaluates the final parameters, unless that has just been done."""
        if self._last != step:
            self._log(step, state)

    def _log(self, step: int, state: TrainState) -> None:
        with self._throughput.pause(state):
            loss = fetch_metrics(step, {"val_loss": self._evaluate(state)})["val_loss"]
        self._loggers.log(step, {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))})
        self._last = step
