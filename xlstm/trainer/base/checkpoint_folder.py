"""The folder of a run's checkpoints: one folder a step, which counts once its checksums are there.

Only the first process changes anything here.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from xlstm.trainer.base.checksums import has_checksums, write_checksums
from xlstm.trainer.base.files import write_atomically

_RUN_INFO = "run_info.json"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        max_to_keep: The last so many.
        keep_interval: Those of steps that it divides, for ever; 0 for none.
        keep_best: Whether the one with the lowest validation loss is kept, too.
    """

    max_to_keep: int
    keep_interval: int = 0
    keep_best: bool = False

    def kept(self, val_losses: Mapping[int, float | None]) -> dict[int, float | None]:
        """Chooses among checkpoints, given as validation losses by step."""
        kept = set(sorted(val_losses)[-self.max_to_keep :])
        if self.keep_interval:
            kept |= {step for step in val_losses if step % self.keep_interval == 0}
        best = best_step(val_losses)
        if self.keep_best and best is not None:
            kept.add(best)
        return {step: val_losses[step] for step in sorted(kept)}


def best_step(val_losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest validation loss, the first of several; None if no loss is known."""
    known = [step for step in sorted(val_losses) if val_losses[step] is not None]
    return min(known, key=val_losses.__getitem__, default=None)


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a run's checkpoints.

    Attributes:
        path: The folder; it need not be there.
    """

    path: str

    def of_step(self, step: int) -> str:
        """The folder of a checkpoint."""
        return os.path.join(self.path, str(step))

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or not, in ascending order."""
        return sorted(int(name) for name in self._names() if name.isdigit())

    def whole_steps(self) -> list[int]:
        """The steps of the whole checkpoints, in ascending order."""
        return [step for step in self.steps() if self.is_whole(step)]

    def is_whole(self, step: int) -> bool:
        """Whether a checkpoint was written to its end, its checksums being the end."""
        return has_checksums(self.of_step(step))

    def val_losses(self) -> dict[int, float | None]:
        """Validation losses by step, of the whole checkpoints."""
        return {step: self._val_loss(step) for step in self.whole_steps()}

    def run_info(self, step: int) -> dict[str, Any]:
        """What `complete` was told of the run."""
        return self._read(step)["run"]

    def make(self, step: int) -> None:
        """Makes the empty folder of a checkpoint; one that is there is removed."""
        self.remove([step])
        os.makedirs(self.of_step(step))

    def complete(self, step: int, run_info: dict[str, Any], val_loss: float | None) -> None:
        """Makes a checkpoint whose arrays are written a whole one.

        Args:
            step: Its step.
            run_info: What is to be known of the run; JSON must be able to hold it.
            val_loss: The validation loss after that step, if it is known.
        """
        path = os.path.join(self.of_step(step), _RUN_INFO)
        write_atomically(path, json.dumps({"val_loss": val_loss, "run": run_info}, indent=1))
        write_checksums(self.of_step(step))

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints; if this is interrupted, what is left is no checkpoint any more."""
        for path in (self.of_step(step) for step in steps):
            if os.path.exists(path):  # Somebody may have taken it away.
                os.rename(path, f"{path}.removed")
                shutil.rmtree(f"{path}.removed")

    def remove_leftovers(self) -> None:
        """Removes what a killed run left half written or half removed; its name has a suffix."""
        for name in self._names():
            stem, point, _ = name.partition(".")
            if point and stem.isdigit():
                shutil.rmtree(os.path.join(self.path, name))

    def set_aside(self, step: int) -> str:
        """Moves a checkpoint out of the way, and returns to where."""
        parent = os.path.join(os.path.dirname(os.path.abspath(self.path)), "damaged_checkpoints")
        os.makedirs(parent, exist_ok=True)
        taken, number = set(os.listdir(parent)), 1
        name = str(step)
        while name in taken:
            number += 1
            name = f"{step}-{number}"
        os.rename(self.of_step(step), os.path.join(parent, name))
        return os.path.join(parent, name)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def _val_loss(self, step: int) -> float | None:
        try:
            return self._read(step)["val_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # It is damaged, and so it is not the best.

    def _read(self, step: int) -> dict[str, Any]:
        with open(os.path.join(self.of_step(step), _RUN_INFO), encoding="utf-8") as file:
            return json.load(file)
