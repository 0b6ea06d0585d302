"""Logging to Weights & Biases; only runs that ask for it import its package."""

import os
import secrets
import warnings
from types import ModuleType
from typing import Any

from xlstm.files import write_atomically
from xlstm.trainer.logger.base_logger import Logger
from xlstm.trainer.logger.jsonl import read_rows

_FINISH_TIMEOUT = 60.0  # Seconds; the next start of the run sends the rest.


def check_wandb() -> None:
    """Checks that a run can log to Weights & Biases, before the run creates anything.

    The environment variable `WANDB_MODE` selects whether to send the rows (`online`, the default),
    to keep them in the run's folder (`offline`) or to do nothing (`disabled`).

    Raises:
        ValueError: If the package is missing, or the mode is `online` and there is no valid key.
    """
    wandb = _import_wandb()
    if wandb.setup().settings.mode == "online":
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise _unusable(error) from error


class WandbLogger(Logger):
    """A logger that logs every row as a step of a run of Weights & Biases.

    However often a run is started, it is one run there, with each step once. A start first sends
    the rows of the metrics file that Weights & Biases lacks. Steps that are done again but were
    sent before stay as they are, since Weights & Biases cannot take them back.

    Offline, each start creates a folder `wandb/offline-run-<time>-<id>` in the run's folder, with
    every step since the first. `wandb sync` of a folder replaces what the run had before, so sync
    only the newest folder, or sync it last.
    """

    def __init__(
        self, directory: str, project: str, name: str, config: dict[str, Any], metrics_path: str
    ):
        """Opens the run; must come after the logger that writes the metrics file.

        Args:
            directory: The run's folder; all files are in its subfolder `wandb`.
            project: The project at Weights & Biases.
            name: The run's name there.
            config: The run's configuration.
            metrics_path: The metrics file, with the rows before the first step of this start.

        Raises:
            ValueError: If the package is missing or Weights & Biases rejects the run.
        """
        wandb = _import_wandb()
        self._errors = (wandb.errors.Error, OSError)
        folder = os.path.join(directory, "wandb")
        os.makedirs(folder, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=_run_id(os.path.join(folder, "run_id")),
                dir=directory,
                config=config,
                # Offline, wandb cannot look up the run and would warn about it.
                resume="allow" if wandb.setup().settings.mode == "online" else None,
                # The terminal shows the progress bar.
                settings=wandb.Settings(console="off", quiet=True, finish_timeout=_FINISH_TIMEOUT),
            )
        except wandb.errors.Error as error:
            raise _unusable(error) from error
        self._first_step = self._run.step  # The first step that Weights & Biases lacks.
        for row in read_rows(metrics_path):
            self.log(row["step"], {name: row[name] for name in row if name != "step"})

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the row; all rows of a step become one step there."""
        if self._run is None or step < self._first_step:
            return
        try:
            self._run.log(scalars, step=step)
        except self._errors as error:
            self._give_up(error)

    def close(self) -> None:
        """Sends the remaining rows, for a minute at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except self._errors as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Stops logging and warns: a failure of Weights & Biases must not end training."""
        self._run = None
        warnings.warn(
            f"Weights & Biases failed ({error}): nothing more is sent until the run is restarted,"
            " which then sends the missing rows",
            stacklevel=2,
        )


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "logger.wandb=True needs the package wandb, which is not installed: run with Bazel, or"
            " run `pip install 'xlstm-lm[wandb]'`"
        ) from error
    return wandb


def _unusable(error: Exception) -> ValueError:
    message = str(error).strip().split("\n")[0].removesuffix(".")
    return ValueError(
        f"logger.wandb=True: {message}; set WANDB_API_KEY to a key of"
        " Weights & Biases, or WANDB_MODE=offline to send the run later"
    )


def _run_id(path: str) -> str:
    """Reads the id in a file, or creates one and writes it."""
    if not os.path.exists(path):
        write_atomically(path, secrets.token_hex(8) + "\n")
    with open(path, encoding="utf-8") as file:
        return file.read().strip()
