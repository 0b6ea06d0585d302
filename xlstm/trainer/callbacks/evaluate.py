"""Callback that evaluates the model during training."""

from collections.abc import Callable

from xlstm.common_types import TrainState
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.trainer import Callback
from xlstm.trainer.logger.base_logger import Logger, validation_suffixes


class EvaluateCallback(Callback):
    """A callback that evaluates before the first step, at intervals, and at the end."""

    def __init__(
        self,
        evaluate: Callable[[TrainState], dict[str, float]],
        logger: Logger,
        clock: Clock,
        interval: int,
        set_val_loss: Callable[[int, float], None] = lambda step, val_loss: None,
    ):
        """Creates the callback.

        Args:
            evaluate: Returns the scalars to log: `val_loss` or `val_loss_<name>` for each
                validation set, and others.
            logger: Logs the scalars.
            clock: Measures how long evaluations take.
            interval: Steps between evaluations.
            set_val_loss: Called with the step and the loss of the first set.
        """
        self._evaluate, self._logger, self._clock = evaluate, logger, clock
        self._interval, self._set_val_loss = interval, set_val_loss
        self._last: int | None = None

    def on_start(self, step: int, state: TrainState) -> None:
        """Evaluates the initial parameters; a resumed run has done so before."""
        if step == 0:
            self.on_step(step, state)
        self._last = step

    def is_due(self, step: int) -> bool:
        """Returns whether the step is a multiple of the interval."""
        return step % self._interval == 0

    def on_step(self, step: int, state: TrainState) -> None:
        """Evaluates and logs the scalars."""
        with self._clock.phase("evaluation"):
            scalars = self._evaluate(state)
            self._logger.log(step, scalars)
        self._last = step
        self._set_val_loss(step, scalars[f"val_loss{validation_suffixes(scalars)[0]}"])

    def on_end(self, step: int, state: TrainState) -> None:
        """Evaluates the final parameters unless `on_step` just did."""
        if self._last != step:
            self.on_step(step, state)
