"""Traces chosen steps."""

import os

import jax

from xlstm.common_types import TrainState
from xlstm.trainer.base.trainer import Callback


class ProfileCallback(Callback):
    """Records chosen steps with JAX's profiler, for TensorBoard or Perfetto."""

    def __init__(self, directory: str, steps: tuple[int, ...]):
        """Makes the callback.

        Args:
            directory: Where traces go: `step_<first>` for each stretch of neighbouring steps.
            steps: The steps.
        """
        self._directory, self._steps, self._is_tracing = directory, frozenset(steps), False

    def on_start(self, step: int, state: TrainState) -> None:
        """Starts a trace if the first step is chosen."""
        self.on_step(step, state)

    def is_due(self, step: int) -> bool:
        """Whether a trace begins or ends after this step."""
        return self._is_tracing != (step + 1 in self._steps)

    def on_step(self, step: int, state: TrainState) -> None:
        """Ends and begins traces when the step's work is done."""
        jax.block_until_ready(state)
        self.close()
        self._is_tracing = step + 1 in self._steps
        if self._is_tracing:
            jax.profiler.start_trace(os.path.join(self._directory, f"step_{step + 1}"))

    def close(self) -> None:
        """Ends a trace that is still going on, so that what it has is written."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
