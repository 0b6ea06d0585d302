"""The loop over steps, and the callbacks beside it."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.finite import check_finite
from xlstm.trainer.base.clock import Clock


class RollBack(Exception):
    """Raised by `Callback.on_metrics`: training goes on after that step, from another state.

    Callbacks after that one do not hear of the step's metrics.
    """

    def __init__(self, restore: Callable[[TrainState], TrainState]):
        """Takes what makes the state after the step of the one that there is, which it consumes."""
        super().__init__()
        self.restore = restore


class Stop(Exception):
    """Raised by `Callback.on_step`: training ends after that step, before its time."""


class Callback:
    """Does nothing; a callback overrides what it needs."""

    def on_start(self, step: int, state: TrainState) -> None:
        """Called before the first step, with the number of steps done before."""

    def is_due(self, step: int) -> bool:
        """Whether `on_step` wants to be called after this step."""
        return False

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Called for every step in order, a step late or more: waiting would leave devices idle."""

    def on_step(self, step: int, state: TrainState) -> None:
        """Called after a step that is due, when all metrics up to it have been handed out."""

    def on_end(self, step: int, state: TrainState) -> None:
        """Called after the last step, behind its `on_step`; not after `Stop` or an error."""

    def close(self) -> None:
        """Called once by whoever made it, when there will be no more steps, whatever the reason."""


NAN_POLICIES = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Length of a run, and what happens at which steps."""

    num_steps: int = 1000  # Steps of the optimizer.
    seed: int = 0  # Seed of the initial parameters.
    init_from: str = ""  # Begin with the parameters of this run (its folder, or that of one of its
    # checkpoints); empty: with random ones.
    num_minibatches: int = 1  # Minibatches that gradients are accumulated over in a step.
    eval_interval: int = 200  # Steps between evaluations; there is one before and one at the end.
    eval_batches: int = 50  # Largest number of batches in an evaluation of a validation set.
    checkpoint_interval: int = 200  # Steps between checkpoints; there is one at the end.
    checkpoint_minutes: float = 0.0  # A checkpoint also after so many minutes; 0: by steps alone.
    max_checkpoints: int = 2  # The last so many checkpoints are kept.
    keep_checkpoint_interval: int = 0  # Checkpoints of its multiples are kept for ever; 0: none.
    keep_best_checkpoint: bool = False  # Whether that with the lowest validation loss is kept too:
    # the loss of the held-out set or, without one, of the first of data.validation_stores.
    nan_policy: str = "stop"  # After a gradient that is not finite: stop; skip (leave its step
    # out); or rollback (go on behind it with the parameters of the last confirmed checkpoint).
    max_skipped_steps: int = 20  # So many steps left out in a row stop the run.
    confirm_steps: int = 10  # A checkpoint is confirmed, so that a run resumes from it, if the last
    # so many steps (or all) were sound: finite and within the next two limits; 0: every one is.
    max_loss_spike: float = 2.0  # A loss so many nats above the mean of the last 50 sound steps, or
    # the lowest such mean, is not sound, if it is above their five standard deviations too.
    max_update_ratio: float = 1.0  # An update, or the growth of the parameters, is too large if its
    # norm is above so many times the parameters' norm in the last 50 sound steps.
    stall_seconds: int = 600  # After so long without progress the run says what hangs; 0: never.

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


def to_row(metrics: Metrics) -> dict[str, float]:
    """Makes numbers of metrics on the host: of a pair (sum, count) the mean."""
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
    to_row: Callable[[Metrics], dict[str, float]] = to_row,
) -> TrainState:
    """Trains from one step to another.

    Args:
        state: The state after `start_step` steps; it is consumed.
        batches_from: Makes the iterator over global batches from the one that follows so many
            steps.
        train_step: See `create_train_step`.
        start_step: Steps done before.
        num_steps: Steps to have done at the end.
        callbacks: What else happens; called in this order.
        clock: Is told what the time is spent on.
        to_row: Makes numbers of a step's metrics, which are on the host.

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
            # One step waits its turn while the devices compute the one before.
            num_waiting = 0 if due or step == num_steps else 1
            while len(pending) > num_waiting:
                done, metrics = pending.popleft()
                try:
                    with clock.phase("step"):
                        row = to_row(jax.device_get(metrics))
                    for callback in callbacks:
                        callback.on_metrics(done, row)
                except RollBack as rollback:
                    pending.clear()
                    state, step = rollback.restore(state), done
                    batches = batches_from(step)
                    # What is due after the step that is left out has not been done yet.
                    due = [callback for callback in callbacks if callback.is_due(step)]
            for callback in callbacks:
                if callback in due:
                    callback.on_step(step, state)
                if step == num_steps:
                    callback.on_end(step, state)
    except Stop:
        pass
    return state
