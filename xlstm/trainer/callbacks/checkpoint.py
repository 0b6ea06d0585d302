"""Callback that writes checkpoints, and stops the run when asked to."""

import time

import jax

from xlstm.common_types import TrainState
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.multihost import Request, Requests
from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.base.trainer import Callback, Stop
from xlstm.trainer.checkpoints.checkpointer import Checkpointer


class CheckpointCallback(Callback):
    """A callback that writes checkpoints at intervals, on request, and at the end."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        clock: Clock,
        requests: Requests,
        soundness: Soundness,
        *,
        interval: int,
        minutes: float = 0.0,
        best_interval: int = 0,
    ):
        """Creates the callback.

        Args:
            checkpointer: Writes the checkpoints.
            clock: Measures how long a checkpoint delays training.
            requests: Receives the requests of this process, and their answers.
            soundness: Knows whether the steps so far were sound.
            interval: Steps between checkpoints.
            minutes: A checkpoint is written when the last one is this old; 0 disables.
            best_interval: At multiples of this step, `set_val_loss` is called first and a
                checkpoint is written if the loss is the lowest so far; 0 disables.
        """
        self._checkpointer, self._clock, self._requests = checkpointer, clock, requests
        self._soundness = soundness
        self._interval, self._seconds = interval, 60 * minutes
        self._best_interval = best_interval
        self._last_step: int | None = None
        self._last_time, self._has_asked = time.monotonic(), False
        self._request = Request.NONE
        self._val_losses: dict[int, float] = {}

    def set_val_loss(self, step: int, val_loss: float) -> None:
        """Sets the validation loss of a step; must be called before its `on_step`."""
        self._val_losses = {step: val_loss}

    def on_start(self, step: int, state: TrainState) -> None:
        """Looks up the latest checkpoint."""
        self._last_step = self._checkpointer.latest_step()

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Collects the requests of all processes; process 0 watches the time."""
        self._request = max(self._request, Request(int(metrics.get("request", Request.NONE))))
        is_late = self._seconds and time.monotonic() - self._last_time > self._seconds
        if is_late and not self._has_asked and jax.process_index() == 0:
            self._has_asked = True
            self._requests.ask(Request.CHECKPOINT)

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint may be due; raises OSError if the last one failed."""
        self._checkpointer.check_for_errors()
        return self._is_wanted(step) or self._is_multiple(step, self._best_interval)

    def on_step(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint if one is due; raises Stop if a process asked for it."""
        if self._is_wanted(step) or self._is_best(step):
            self._save(step, state)
        if self._request == Request.STOP:
            raise Stop
        self._request = Request.NONE

    def on_end(self, step: int, state: TrainState) -> None:
        """Writes the last checkpoint if it does not exist yet."""
        self._save(step, state)

    @staticmethod
    def _is_multiple(step: int, interval: int) -> bool:
        return bool(interval) and step % interval == 0

    def _is_wanted(self, step: int) -> bool:
        return self._is_multiple(step, self._interval) or self._request > Request.NONE

    def _is_best(self, step: int) -> bool:
        if not self._is_multiple(step, self._best_interval) or step not in self._val_losses:
            return False
        self._checkpointer.wait_until_finished()
        best = self._checkpointer.best_loss()
        return best is None or self._val_losses[step] < best

    def _save(self, step: int, state: TrainState) -> None:
        self._requests.answered(Request.CHECKPOINT)
        if step == self._last_step:
            return
        with self._clock.phase("checkpoint"):
            self._checkpointer.save(
                step,
                state,
                self._val_losses.get(step),
                confirmed=self._soundness.confirms(),
                soundness=self._soundness.to_dict(),
            )
        self._last_step = step
        self._last_time, self._has_asked = time.monotonic(), False
