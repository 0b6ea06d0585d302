"""Writes checkpoints."""

from xlstm.common_types import Metrics, TrainState
from xlstm.trainer.base.callback import Callback
from xlstm.trainer.base.checkpointing import Checkpointer
from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.metrics import fetch_metrics


class CheckpointCallback(Callback):
    """Writes a checkpoint every so many steps and at the end."""

    def __init__(self, checkpointer: Checkpointer, throughput: Throughput, interval: int):
        """Makes the callback; `throughput` is paused while a checkpoint holds training up."""
        self._checkpointer, self._throughput, self._interval = checkpointer, throughput, interval
        self._last_metrics: Metrics = {}

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes a checkpoint if its turn has come."""
        self._last_metrics = metrics
        if step % self._interval == 0:
            with self._throughput.pause(state):
                self._save(step, state)

    def on_end(self, step: int, state: TrainState) -> None:
        """Writes the last checkpoint if it is not there."""
        if self._checkpointer.latest_step() != step:
            self._save(step, state)

    def _save(self, step: int, state: TrainState) -> None:
        fetch_metrics(step, self._last_metrics)  # Raises if they are not finite.
        self._checkpointer.save(step, state)
