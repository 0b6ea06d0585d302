"""Weights & Biases: optional; its package is only imported by runs that ask for it."""

import os
import secrets
import warnings
from types import ModuleType
from typing import Any

from xlstm.files import write_atomically
from xlstm.trainer.logger.base_logger import Logger
from xlstm.trainer.logger.jsonl import read_rows

_FINISH_TIMEOUT = 60.0  # Seconds; what is not sent by then, the next start of the run sends.


def check_wandb() -> None:
    """Checks that a run can log to Weights & Biases, so that it can fail before anything is made.

    The environment variable `WANDB_MODE` says whether to send (`online`, the default), to keep
    everything in the run's folder (`offline`) or to do nothing (`disabled`).

    Raises:
        ValueError: If the package is missing, or rows are to be sent and there is no valid key.
    """
    wandb = _import_wandb()
    if wandb.setup().settings.mode == "online":
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise _unusable(error) from error


class WandbLogger(Logger):
    """Logs every row as a step of a run of Weights & Biases.

    However often a run is started, it is one run there, with each step once. What a start finds in
    the metrics file and Weights & Biases lacks is sent first. Steps that are done again and which
    Weights & Biases has already stay as they are there: it cannot take back what it was sent.

    Offline, each start makes a folder `wandb/offline-run-<time>-<id>` in the run's folder, with
    everything since the first step. Sent by `wandb sync`, a folder takes the place of what the run
    had before, so it is the newest that should come last; the others are not needed.
    """

    def __init__(
        self, directory: str, project: str, name: str, config: dict[str, Any], metrics_path: str
    ):
        """Opens the run; it must come after the logger that writes the metrics file.

        Args:
            directory: The run's folder; `wandb` in it is where everything lies.
            project: The project at Weights & Biases.
            name: The run's name there.
            config: The run's configuration.
            metrics_path: The metrics file, with the rows before the step to go on from.

        Raises:
            ValueError: If the package is missing or Weights & Biases refuses the run.
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
                # Offline there is nobody to ask what the run had, and a warning would say so.
                resume="allow" if wandb.setup().settings.mode == "online" else None,
                # The terminal is the progress bar's.
                settings=wandb.Settings(console="off", quiet=True, finish_timeout=_FINISH_TIMEOUT),
            )
        except wandb.errors.Error as error:
            raise _unusable(error) from error
        self._first_step = self._run.step  # The first that Weights & Biases lacks.
        for row in read_rows(metrics_path):
            self.log(row["step"], {name: row[name] for name in row if name != "step"})

    def log(self, step: int, row: dict[str, float]) -> None:
        """Hands the row over; rows of one step become one step there."""
        if self._run is None or step < self._first_step:
            return
        try:
            self._run.log(row, step=step)
        except self._errors as error:
            self._give_up(error)

    def close(self) -> None:
        """Sends what is left, for a minute at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except self._errors as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Goes on without: weeks of training do not end since a process beside them did."""
        self._run = None
        warnings.warn(
            f"Weights & Biases failed ({error}): nothing more is sent until the run is started"
            " again, which sends what is missing",
            stacklevel=2,
        )


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "logger.wandb=True needs the package wandb, which is not installed: Bazel brings it"
            " along, elsewhere `pip install wandb` does"
        ) from error
    return wandb


def _unusable(error: Exception) -> ValueError:
    message = str(error).strip().split("\n")[0].removesuffix(".")
    return ValueError(
        f"logger.wandb=True: {message}; set WANDB_API_KEY to a key of"
        " Weights & Biases, or WANDB_MODE=offline to send the run later"
    )


def _run_id(path: str) -> str:
    """Reads the id in a file, or thinks of one and writes it."""
    if not os.path.exists(path):
        write_atomically(path, secrets.token_hex(8) + "\n")
    with open(path, encoding="utf-8") as file:
        return file.read().strip()
