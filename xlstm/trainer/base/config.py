"""Configuration of the training loop and its callbacks."""

import dataclasses

from xlstm.finite import check_finite

NAN_POLICIES = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Length of a run, and what happens at which steps."""

    num_steps: int = 1000  # Train for this many optimizer steps.
    seed: int = 0  # Use this seed for the initial parameters and for dropout.
    init_from: str = ""  # Start from the parameters of this run or checkpoint (a folder); empty
    # starts from random ones.
    num_minibatches: int = 1  # Accumulate the gradients of a step over this many minibatches.
    eval_interval: int = 200  # Evaluate at multiples of this step, at the start and at the end.
    eval_batches: int = 50  # Evaluate on at most this many batches of each validation set.
    checkpoint_interval: int = 200  # Write checkpoints at multiples of this step and at the end.
    checkpoint_minutes: float = 0.0  # Also write a checkpoint when the last one is this many
    # minutes old; 0 disables.
    max_checkpoints: int = 2  # Keep this many of the latest confirmed checkpoints.
    keep_checkpoint_interval: int = 0  # Permanently keep checkpoints at multiples of this step; 0
    # disables.
    keep_best_checkpoint: bool = False  # Also keep the checkpoint with the lowest validation loss:
    # on the held-out set or, without one, on the first of data.validation_stores.
    nan_policy: str = "stop"  # After a loss or norm that is not finite: stop ends the run, skip
    # continues without the step, rollback continues from the last confirmed checkpoint.
    max_skipped_steps: int = 20  # Stop the run after this many skipped steps in a row.
    confirm_steps: int = 10  # Confirm a checkpoint, so that runs resume from it, if this many steps
    # before it (or all) were sound: finite and within the next two limits; 0 confirms all.
    max_loss_spike: float = 2.0  # A step is not sound if its loss exceeds the mean of the last 50
    # sound steps, or the lowest such mean, by this many nats and by five standard deviations.
    max_update_ratio: float = 1.0  # A step is not sound if the norm of its update, or the growth of
    # the parameters' norm, exceeds this many times their mean norm over the last 50 sound steps.
    stall_seconds: int = 600  # Report what hangs after this many seconds without progress; 0
    # disables.

    def __post_init__(self):
        check_finite("trainer.", self)
        may_be_zero = {
            "seed",
            "checkpoint_minutes",
            "keep_checkpoint_interval",
            "confirm_steps",
            "stall_seconds",
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in may_be_zero else 1
            is_limit = field.name in ("max_loss_spike", "max_update_ratio")
            if is_limit and not value > 0:
                raise ValueError(f"trainer.{field.name}={value}: it must be above 0")
            if not is_limit and type(value) in (int, float) and not value >= least:
                raise ValueError(f"trainer.{field.name}={value}: it must be at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"trainer.seed={self.seed}: it must be below 2**32")
        if self.nan_policy not in NAN_POLICIES:
            raise ValueError(
                f"trainer.nan_policy={self.nan_policy!r} is unknown: choose one of"
                f" {', '.join(NAN_POLICIES)}"
            )
