"""The interface of loggers, a logger that combines several, and their configuration."""

import contextlib
import dataclasses
from collections.abc import Sequence

from xlstm.finite import check_finite


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
    """Logging of a run."""

    interval: int = 10  # Log metrics at multiples of this step.
    tensorboard: bool = True  # Write TensorBoard event files.
    wandb: bool = False  # Log to Weights & Biases; WANDB_MODE=offline only stores the data.
    wandb_project: str = "xlstm"  # Log to this project at Weights & Biases.
    param_norms: bool = False  # Log the norms of every parameter and of its gradient.
    gate_statistics: bool = False  # Log statistics of every block's gates.
    profile_steps: tuple[int, ...] = ()  # Trace these steps with JAX's profiler.
    sample_tokens: int = 400  # Sample a text of this many tokens at the end; 0 disables.
    sample_temperature: float = 0.8  # Divide the logits of the sample by this temperature.
    sample_prompt: str = ""  # Start the sampled text with this prompt.

    def __post_init__(self):
        check_finite("logger.", self)
        if self.interval < 1:
            raise ValueError(f"logger.interval={self.interval}: it must be at least 1")
        if any(step < 1 for step in self.profile_steps):
            raise ValueError(f"logger.profile_steps={self.profile_steps}: steps count from 1")
        if self.sample_tokens < 0 or self.sample_temperature < 0:
            raise ValueError(
                f"logger.sample_tokens={self.sample_tokens} and logger.sample_temperature="
                f"{self.sample_temperature} must not be negative"
            )


def validation_suffixes(scalars: dict[str, float]) -> list[str]:
    """Returns the suffixes of the keys `val_loss<suffix>`: `_<name>`, or empty for the held-out."""
    return [key.removeprefix("val_loss") for key in scalars if key.startswith("val_loss")]


class Logger:
    """Base class of loggers; every method does nothing unless overridden."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the metrics of a step, or of an evaluation after it."""

    def progress(self, step: int) -> None:
        """Called after every step, for a display of progress."""

    def close(self) -> None:
        """Called once, at the end or after an error."""


class Loggers(Logger):
    """A logger that combines several."""

    def __init__(self, loggers: Sequence[Logger]):
        """Takes the loggers, which are called in this order."""
        self._loggers = list(loggers)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Calls `log` of each logger."""
        for logger in self._loggers:
            logger.log(step, scalars)

    def progress(self, step: int) -> None:
        """Calls `progress` of each logger."""
        for logger in self._loggers:
            logger.progress(step)

    def close(self) -> None:
        """Closes each logger, even if closing another one fails."""
        with contextlib.ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)
