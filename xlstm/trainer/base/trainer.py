"""The training loop."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.trainer.base.callback import Callback


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Length of a run, and what happens at which steps."""

    num_steps: int = 1000  # Steps of the optimizer.
    seed: int = 0  # Seed of the initial parameters.
    num_minibatches: int = 1  # Minibatches that gradients are accumulated over in a step.
    eval_interval: int = 200  # Steps between evaluations; there is one before and one at the end.
    eval_batches: int = 50  # Largest number of batches in an evaluation.
    checkpoint_interval: int = 200  # Steps between checkpoints; there is one at the end.
    max_checkpoints: int = 2  # The last so many checkpoints are kept.

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "seed" else 1
            if value < least:
                raise ValueError(f"trainer.{field.name}={value}: it must be at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"trainer.seed={self.seed}: it must be below 2**32")


def fit(
    state: TrainState,
    batches: Iterator[PyTree],
    train_step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
    *,
    start_step: int,
    num_steps: int,
    callbacks: Sequence[Callback],
) -> TrainState:
    """Trains from one step to another.

    Args:
        state: The state after `start_step` steps; it is consumed.
        batches: Global batches, the first of them that of step `start_step + 1`.
        train_step: See `create_train_step`.
        start_step: Steps done before.
        num_steps: Steps to have done at the end.
        callbacks: What else happens; called in this order.

    Returns:
        The state at the end.
    """
    for callback in callbacks:
        callback.on_start(start_step, state)
    for step in range(start_step + 1, num_steps + 1):
        state, metrics = train_step(state, next(batches))
        for callback in callbacks:
            callback.on_step(step, state, metrics)
    for callback in callbacks:
        callback.on_end(num_steps, state)
    return state
