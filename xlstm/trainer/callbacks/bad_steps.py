"""What a run does about gradients that are not finite."""

import math
from collections.abc import Callable

from xlstm.common_types import TrainState
from xlstm.trainer.base.callback import Callback, RollBack


class BadStepsCallback(Callback):
    """Follows `trainer.nan_policy` after a step whose gradient or loss was not finite.

    The step itself has left parameters and optimizer as they were. Then

    * `stop` ends the run with an error;
    * `skip` goes on;
    * `rollback` goes on with the parameters and the optimizer of the last checkpoint, behind the
      bad step: no batch since that checkpoint is used again.

    Under each the batch is dumped and named. Steps left out in a row, also for a gradient norm that
    was too large, end the run when they are too many; they are counted since its last start.
    """

    def __init__(
        self,
        policy: str,
        max_skipped_steps: int,
        *,
        dump_batch: Callable[[int], str],
        roll_back: Callable[[int, TrainState], TrainState],
        report: Callable[[str], None],
    ):
        """Makes the callback.

        Args:
            policy: `stop`, `skip` or `rollback`.
            max_skipped_steps: So many bad steps in a row end the run.
            dump_batch: Writes a step's batch into a file and returns a sentence that names it.
            roll_back: Makes the state after a step of the last checkpoint; consumes the state.
            report: Takes a line for the user.
        """
        self._policy, self._max_skipped_steps = policy, max_skipped_steps
        self._dump_batch, self._roll_back, self._report = dump_batch, roll_back, report
        self._num_in_a_row = 0

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Raises ValueError to end the run, or RollBack."""
        if not metrics["skipped"] and math.isfinite(metrics["loss"]):
            self._num_in_a_row = 0
            return
        self._num_in_a_row += 1
        values = ", ".join(f"{name}={metrics[name]:.4g}" for name in ("loss", "grad_norm"))
        if math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics["loss"]):
            message = f"step {step} was left out: its gradient norm is an outlier ({values})"
            policy = "skip"
        else:
            message = f"training diverged at step {step} ({values}); {self._dump_batch(step)}"
            policy = self._policy
        if policy == "stop":
            raise ValueError(
                f"{message}; nothing of this step was kept: lower schedule.peak_lr or"
                " optimizer.grad_clip_norm, or choose another trainer.nan_policy"
            )
        if self._num_in_a_row >= self._max_skipped_steps:
            raise ValueError(
                f"{message}; it is the last of {self._num_in_a_row} such steps in a row"
                " (trainer.max_skipped_steps)"
            )
        self._report(message)
        if policy == "rollback":
            raise RollBack(lambda state: self._roll_back(step, state))
