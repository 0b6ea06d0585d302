"""Callback that handles steps that are not sound."""

import math
from collections.abc import Callable

from xlstm.common_types import TrainState
from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.base.trainer import Callback, RollBack

_NUMBERS = ("loss", "grad_norm", "param_norm", "update_norm")


class BadStepsCallback(Callback):
    """A callback that judges every step, and applies `trainer.nan_policy` to non-finite ones.

    A step with a non-finite gradient or loss has left parameters and optimizer unchanged. The
    policy decides what follows:

    * `stop` ends the run with an error;
    * `skip` continues, unless an earlier step has made the parameters non-finite;
    * `rollback` continues after the bad step with the parameters and the optimizer of the last
      confirmed checkpoint: no batch since that checkpoint is used again.

    Under each policy the batch is dumped and its file is named. Too many skipped steps in a row end
    the run; these include steps skipped for a gradient norm that was too large, and are counted
    since the run was last started. A finite step that is not sound is reported if the one before it
    was sound.
    """

    def __init__(
        self,
        policy: str,
        max_skipped_steps: int,
        soundness: Soundness,
        *,
        confirmed_step: Callable[[], int | None],
        dump_batch: Callable[[int], str],
        roll_back: Callable[[int, TrainState], TrainState],
        report: Callable[[str], None],
    ):
        """Creates the callback.

        Args:
            policy: `stop`, `skip` or `rollback`.
            max_skipped_steps: Number of bad steps in a row that ends the run.
            soundness: Judges every step.
            confirmed_step: Returns the step of the last confirmed checkpoint; None if there is
                none.
            dump_batch: Writes a step's batch to a file and returns a sentence that names the file.
            roll_back: Consumes the state after a step, and returns the one to continue from.
            report: Shows a line to the user.
        """
        self._policy, self._max_skipped_steps = policy, max_skipped_steps
        self._soundness, self._confirmed_step = soundness, confirmed_step
        self._dump_batch, self._roll_back, self._report = dump_batch, roll_back, report
        self._num_in_a_row, self._was_sound = 0, True

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Judges the step; raises ValueError to end the run, or RollBack."""
        fault = self._soundness.judge(metrics)
        was_sound, self._was_sound = self._was_sound, fault is None
        values = ", ".join(f"{name}={metrics[name]:.4g}" for name in _NUMBERS)
        is_finite = all(math.isfinite(metrics[name]) for name in _NUMBERS)
        if is_finite and not metrics["skipped"]:
            self._num_in_a_row = 0
            if fault and was_sound:
                self._report(f"step {step} is not sound: {fault}. {self.advice()}")
            return
        self._num_in_a_row += 1
        if is_finite:
            message = f"step {step} was skipped: its gradient norm is an outlier ({values})"
            policy = "skip"
        else:
            message = f"training diverged at step {step} ({values}); {self._dump_batch(step)}"
            policy = self._policy
        if policy == "stop":
            raise ValueError(f"{message}. {self.advice()}, or another trainer.nan_policy")
        if policy == "skip" and not math.isfinite(metrics["param_norm"] + metrics["update_norm"]):
            raise ValueError(
                f"{message}; the parameters are no longer finite, so skipping steps does not help."
                f" {self.advice()}"
            )
        if self._num_in_a_row >= self._max_skipped_steps:
            raise ValueError(
                f"{message}; it is the last of {self._num_in_a_row} such steps in a row, the limit"
                f" of trainer.max_skipped_steps. {self.advice()}"
            )
        self._report(message)
        if policy == "rollback":
            raise RollBack(lambda state: self._roll_back(step, state))

    def advice(self) -> str:
        """Returns a sentence that says which checkpoint to resume from, and what to change."""
        step = self._confirmed_step()
        how = (
            "No checkpoint is confirmed: start from scratch in another --workdir"
            if step is None
            else f"The last confirmed checkpoint is that of step {step}: resume from it with"
            " --allow_config_change"
        )
        return f"{how} and a lower schedule.peak_lr or optimizer.grad_clip_norm"
