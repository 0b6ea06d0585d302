"""The interface of what happens beside the training steps."""

from xlstm.common_types import Metrics, TrainState


class Callback:
    """Does nothing; a callback overrides what it needs."""

    def on_start(self, step: int, state: TrainState) -> None:
        """Called before the first step, with the number of steps done before."""

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Called after every step, with its number and its metrics, which may not be there yet."""

    def on_end(self, step: int, state: TrainState) -> None:
        """Called after the last step."""
