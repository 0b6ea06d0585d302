"""The training loop, its callbacks, and the configuration of both."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.finite import check_finite
from xlstm.trainer.base.clock import Clock

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
    nan_policy: str = "stop"  # After a loss or gradient that is not finite: stop ends the run, skip
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


class RollBack(Exception):
    """Raised by `Callback.on_metrics` to continue after that step from another state.

    Later callbacks do not get the metrics of the step.
    """

    def __init__(self, restore: Callable[[TrainState], TrainState]):
        """Takes a function that consumes the current state and returns the state to use instead."""
        super().__init__()
        self.restore = restore


class Stop(Exception):
    """Raised by `Callback.on_step` to end training early, after that step."""


class Callback:
    """Base class of callbacks; every method does nothing unless overridden."""

    def on_start(self, step: int, state: TrainState) -> None:
        """Called before the first step, with the number of steps done before."""

    def is_due(self, step: int) -> bool:
        """Returns whether to call `on_step` after this step."""
        return False

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Called for every step in order, at least a step late so that no device has to wait."""

    def on_step(self, step: int, state: TrainState) -> None:
        """Called after a step that is due, after `on_metrics` of all steps up to it."""

    def on_end(self, step: int, state: TrainState) -> None:
        """Called after the last step and its `on_step`; not after `Stop` or an error."""

    def close(self) -> None:
        """Called once by the callback's creator when training has ended for any reason."""


def to_scalars(metrics: Metrics) -> dict[str, float]:
    """Converts metrics on the host to floats; a pair (sum, count) becomes the mean."""
    return {
        name: float(value[0] / value[1]) if isinstance(value, tuple) else float(value)
        for name, value in metrics.items()
    }


def fit(
    state: TrainState,
    batches_from: Callable[[int], Iterator[PyTree]],
    train_step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
    *,
    start_step: int,
    num_steps: int,
    callbacks: Sequence[Callback],
    clock: Clock,
    to_scalars: Callable[[Metrics], dict[str, float]] = to_scalars,
) -> TrainState:
    """Trains from one step to another.

    Args:
        state: The state after `start_step` steps; it is consumed.
        batches_from: Returns an iterator over the global batches that follow a number of steps.
        train_step: See `create_train_step`.
        start_step: Number of steps done before.
        num_steps: Number of steps done at the end.
        callbacks: Called in this order.
        clock: Measures the time of each phase.
        to_scalars: Converts the metrics of a step, on the host, to floats.

    Returns:
        The state at the end.
    """
    step, batches = start_step, batches_from(start_step)
    pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    compiled = set()
    for callback in callbacks:
        callback.on_start(step, state)
    try:
        while step < num_steps:
            with clock.phase("data"):
                batch = next(batches)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            with clock.phase("step" if shapes in compiled else "compile"):
                state, metrics = train_step(state, batch)
            compiled.add(shapes)
            step += 1
            pending.append((step, metrics))
            due = [callback for callback in callbacks if callback.is_due(step)]
            # The metrics of one step stay pending while the devices compute the next one.
            num_pending = 0 if due or step == num_steps else 1
            while len(pending) > num_pending:
                done, metrics = pending.popleft()
                try:
                    with clock.phase("step"):
                        scalars = to_scalars(jax.device_get(metrics))
                    for callback in callbacks:
                        callback.on_metrics(done, scalars)
                except RollBack as rollback:
                    pending.clear()
                    state, step = rollback.restore(state), done
                    batches = batches_from(step)
                    # The callbacks that are due after the bad step have not run yet.
                    due = [callback for callback in callbacks if callback.is_due(step)]
            for callback in callbacks:
                if callback in due:
                    callback.on_step(step, state)
                if step == num_steps:
                    callback.on_end(step, state)
    except Stop:
        pass
    return state
