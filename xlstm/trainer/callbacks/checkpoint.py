"""Writes checkpoints."""

from xlstm.common_types import Metrics, TrainState
from xlstm.trainer.base.checkpointing import Checkpointer
from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.callback import Callback
from xlstm.trainer.callbacks.metrics import fetch_metrics


class CheckpointCallback(Callback):
    """Writes a checkpoint every so many steps and at the end."""

    def __init__(self, checkpointer: Checkpointer, throughput: Throughput, interval: int):
        """Makes the callback; `throughput` is paused while a checkpoint holds training up."""
        self._checkpointer, self._throughput, self._interval = checkpointer, throughput, interval

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes a checkpoint if its turn has come."""
        if step % self._interval == 0:
            fetch_metrics(step, metrics)  # Raises if they are not finite: no such state is kept.
            with self._throughput.pause():
                self._checkpointer.save(step, state)

    def on_end(self, step: int, state: TrainState) -> None:
        """Writes the last checkpoint if it is not there, and waits for it."""
        if self._checkpointer.latest_step() != step:
            self._checkpointer.save(step, state)
        self._checkpointer.close()
