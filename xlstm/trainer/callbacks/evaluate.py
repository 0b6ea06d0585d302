"""Evaluates the model during training."""

from collections.abc import Callable

from xlstm.common_types import TrainState
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.trainer import Callback
from xlstm.trainer.logger.base_logger import Logger, validation_suffixes


class EvaluateCallback(Callback):
    """Evaluates before the first step, every so many steps, and at the end."""

    def __init__(
        self,
        evaluate: Callable[[TrainState], dict[str, float]],
        logger: Logger,
        clock: Clock,
        interval: int,
        set_val_loss: Callable[[int, float], None] = lambda step, val_loss: None,
    ):
        """Makes the callback.

        Args:
            evaluate: Computes what is to be logged: for each validation set its loss, `val_loss` or
                `val_loss_<name>`, and more.
            logger: Where rows go.
            clock: Is told of an evaluation.
            interval: Steps between evaluations.
            set_val_loss: Is told the step and the loss of the first set.
        """
        self._evaluate, self._logger, self._clock = evaluate, logger, clock
        self._interval, self._set_val_loss = interval, set_val_loss
        self._last: int | None = None

    def on_start(self, step: int, state: TrainState) -> None:
        """Evaluates the initial parameters; a run that goes on has done so already."""
        if step == 0:
            self.on_step(step, state)
        self._last = step

    def is_due(self, step: int) -> bool:
        """Whether the turn of an evaluation has come."""
        return step % self._interval == 0

    def on_step(self, step: int, state: TrainState) -> None:
        """Evaluates and logs."""
        with self._clock.phase("evaluation"):
            row = self._evaluate(state)
            self._logger.log(step, row)
        self._last = step
        self._set_val_loss(step, row[f"val_loss{validation_suffixes(row)[0]}"])

    def on_end(self, step: int, state: TrainState) -> None:
        """Evaluates the final parameters, unless that has just been done."""
        if self._last != step:
            self.on_step(step, state)
