"""The training loop and its callbacks."""

import collections
from collections.abc import Callable, Iterator, Sequence

import jax

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.trainer.base.clock import Clock


class RollBack(Exception):
    """Raised by `Callback.on_metrics` to continue after that step from another state.

    Later callbacks do not get the metrics of the step.
    """

    def __init__(self, restore: Callable[[TrainState], TrainState]):
        """Takes a function that consumes the current state and returns its replacement."""
        super().__init__()
        self.restore = restore


class Stop(Exception):
    """Raised by `Callback.on_step` to end training early, after that step."""


class Callback:
    """Base class of callbacks; every method does nothing unless overridden."""

    def on_start(self, step: int, state: TrainState) -> None:
        """Called before the first step; `step` is the number of steps done before."""

    def is_due(self, step: int) -> bool:
        """Returns whether to call `on_step` after this step."""
        return False

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Called for each step in order, up to a step late so that no device has to wait."""

    def on_step(self, step: int, state: TrainState) -> None:
        """Called after a step that is due, and after `on_metrics` of all steps up to it."""

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
    """Trains up to a step.

    Args:
        state: The state after `start_step` steps; it is consumed.
        batches_from: Returns an iterator over the global batches after a number of steps.
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
