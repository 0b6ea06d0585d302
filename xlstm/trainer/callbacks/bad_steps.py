"""What a run does about steps that are not sound."""

import math
from collections.abc import Callable

from xlstm.common_types import TrainState
from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.base.trainer import Callback, RollBack

_NUMBERS = ("loss", "grad_norm", "param_norm", "update_norm")


class BadStepsCallback(Callback):
    """Judges every step, and follows `trainer.nan_policy` after one that is not finite.

    A step whose gradient or loss was not finite has itself left parameters and optimizer as they
    were. Then

    * `stop` ends the run with an error;
    * `skip` goes on, unless an earlier step has made the parameters infinite;
    * `rollback` goes on with the parameters and the optimizer of the last confirmed checkpoint,
      behind the bad step: no batch since that checkpoint is used again.

    Under each the batch is dumped and named. Steps left out in a row, also for a gradient norm that
    was too large, end the run when they are too many; they are counted since its last start. A
    finite step that is not sound is named if the one before it was.
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
        """Makes the callback.

        Args:
            policy: `stop`, `skip` or `rollback`.
            max_skipped_steps: So many bad steps in a row end the run.
            soundness: Is told of every step.
            confirmed_step: Finds the last confirmed checkpoint; None if there is none.
            dump_batch: Writes a step's batch into a file and returns a sentence that names it.
            roll_back: Makes the state after a step of the last checkpoint; consumes the state.
            report: Takes a line for the user.
        """
        self._policy, self._max_skipped_steps = policy, max_skipped_steps
        self._soundness, self._confirmed_step = soundness, confirmed_step
        self._dump_batch, self._roll_back, self._report = dump_batch, roll_back, report
        self._num_in_a_row, self._was_sound = 0, True

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Raises ValueError to end the run, or RollBack."""
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
            message = f"step {step} was left out: its gradient norm is an outlier ({values})"
            policy = "skip"
        else:
            message = f"training diverged at step {step} ({values}); {self._dump_batch(step)}"
            policy = self._policy
        if policy == "stop":
            raise ValueError(f"{message}. {self.advice()}, or with another trainer.nan_policy")
        if policy == "skip" and not math.isfinite(metrics["param_norm"] + metrics["update_norm"]):
            raise ValueError(
                f"{message}; the parameters are not finite any more, so that leaving steps out"
                f" does not help. {self.advice()}"
            )
        if self._num_in_a_row >= self._max_skipped_steps:
            raise ValueError(
                f"{message}; it is the last of {self._num_in_a_row} such steps in a row"
                f" (trainer.max_skipped_steps). {self.advice()}"
            )
        self._report(message)
        if policy == "rollback":
            raise RollBack(lambda state: self._roll_back(step, state))

    def advice(self) -> str:
        """Says which checkpoint is good, and what to change."""
        step = self._confirmed_step()
        how = (
            "No checkpoint is confirmed: begin anew in another --workdir"
            if step is None
            else f"The last confirmed checkpoint is that of step {step}: go on from it"
            " with --allow_config_change"
        )
        return f"{how} and with a lower schedule.peak_lr or optimizer.grad_clip_norm"
