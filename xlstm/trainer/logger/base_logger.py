"""The interface of loggers, and several of them as one."""

import contextlib
import dataclasses
from collections.abc import Sequence

from xlstm.finite import check_finite


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
    """What a run writes beside its checkpoints."""

    interval: int = 10  # Steps between rows of metrics.
    tensorboard: bool = True  # Whether to write TensorBoard event files.
    wandb: bool = False  # Whether to log to Weights & Biases; WANDB_MODE=offline keeps it here.
    wandb_project: str = "xlstm"  # The project at Weights & Biases.
    param_norms: bool = False  # Whether rows have the norms of every parameter and its gradient.
    gate_statistics: bool = False  # Whether rows have statistics of every block's gates.
    profile_steps: tuple[int, ...] = ()  # Steps to trace with JAX's profiler.
    sample_tokens: int = 400  # Tokens of sampled text at the end; 0 for none.
    sample_temperature: float = 0.8  # Divides the logits of the sample.
    sample_prompt: str = ""  # What the sampled text goes on from.

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


def validation_suffixes(row: dict[str, float]) -> list[str]:
    """What stands behind `val_loss` in a row: for each set `_<name>`, nothing for the held-out."""
    return [key.removeprefix("val_loss") for key in row if key.startswith("val_loss")]


class Logger:
    """Does nothing; a logger overrides what it needs."""

    def log(self, step: int, row: dict[str, float]) -> None:
        """Takes the metrics of a step, or of an evaluation after it."""

    def progress(self, step: int) -> None:
        """Called after every step, to show that something happens."""

    def close(self) -> None:
        """Called once, at the end or after an error."""


class Loggers(Logger):
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]):
        """Makes one logger of several."""
        self._loggers = list(loggers)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Hands the row to each."""
        for logger in self._loggers:
            logger.log(step, row)

    def progress(self, step: int) -> None:
        """Tells each."""
        for logger in self._loggers:
            logger.progress(step)

    def close(self) -> None:
        """Closes each, also when closing another fails."""
        with contextlib.ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)
