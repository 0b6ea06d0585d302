"""The interface of what happens beside the training steps."""

from collections.abc import Callable

from xlstm.common_types import TrainState


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
