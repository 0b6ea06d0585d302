"""The folder of a run's checkpoints: one folder a step, which has another name while it is written.

Only the first process changes anything here.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xlstm.files import inner_path, read_json, write_atomically
from xlstm.trainer.base.multihost import from_first_process
from xlstm.trainer.checkpoints.checksums import has_checksums, write_checksums
from xlstm.trainer.checkpoints.storage import check_storage_path

_RUN_INFO = "run_info.json"
_UNFINISHED, _REMOVED = ".unfinished", ".removed"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is known of a checkpoint without reading its arrays.

    Attributes:
        val_loss: The validation loss after its step, if it is known.
        for_ever: Whether it is never removed; so it stays when a run's configuration changes.
        confirmed: Whether the steps up to it were sound, see `Soundness`; a run resumes from no
            other one.
        soundness: What `Soundness.from_dict` takes.
    """

    val_loss: float | None = None
    for_ever: bool = False
    confirmed: bool = True
    soundness: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        max_to_keep: The last so many that are confirmed; and the newest one if it is not.
        keep_interval: Those of steps that it divides are kept for ever; 0 for none.
        keep_best: Whether the confirmed one with the lowest validation loss is kept, too.
    """

    max_to_keep: int
    keep_interval: int = 0
    keep_best: bool = False

    def is_for_ever(self, step: int) -> bool:
        """Whether a checkpoint that is written now is kept for ever."""
        return self.keep_interval > 0 and step % self.keep_interval == 0

    def kept(self, saved: Mapping[int, Saved]) -> dict[int, Saved]:
        """Chooses among checkpoints, given by step."""
        confirmed = [step for step in sorted(saved) if saved[step].confirmed]
        kept = {*confirmed[-self.max_to_keep :], max(saved)}
        kept |= {step for step in saved if saved[step].for_ever}
        best = best_step(saved)
        if self.keep_best and best is not None:
            kept.add(best)
        return {step: saved[step] for step in sorted(kept)}


def best_step(saved: Mapping[int, Saved]) -> int | None:
    """The confirmed step with the lowest validation loss, the first of several.

    One that is not confirmed is moved away when the run goes on: it takes nobody's place.

    Returns:
        The step; None if no loss is known.
    """
    known = [x for x in sorted(saved) if saved[x].confirmed and saved[x].val_loss is not None]
    return min(known, key=lambda step: saved[step].val_loss, default=None)


def confirmed_step(saved: Mapping[int, Saved]) -> int | None:
    """The step of the newest checkpoint that is confirmed; None if none is."""
    return max((step for step in saved if saved[step].confirmed), default=None)


def step_of_name(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for any other name."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a run's checkpoints.

    Attributes:
        path: The folder; it need not be there.
    """

    path: str

    def __post_init__(self):
        """Raises ValueError if nothing can be stored there."""
        check_storage_path(self.path)

    def of_step(self, step: int) -> str:
        """The folder of a checkpoint."""
        return os.path.join(self.path, str(step))

    def unfinished(self, step: int) -> str:
        """The folder of a checkpoint that is being written."""
        return self.of_step(step) + _UNFINISHED

    def steps(self) -> list[int]:
        """The steps of all checkpoints, damaged ones too, in ascending order."""
        steps = map(step_of_name, self._names())
        return sorted(step for step in steps if step is not None)

    def num_bytes(self) -> int:
        """The size of all files."""
        paths = [
            os.path.join(root, name) for root, _, names in os.walk(self.path) for name in names
        ]
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def whole_steps(self) -> list[int]:
        """The steps of the checkpoints that have checksums, in ascending order."""
        before, steps = None, self.steps()
        while steps != before:  # A run that goes on may have replaced all of them meanwhile.
            whole = [step for step in steps if has_checksums(self.of_step(step))]
            if whole:
                return whole
            before, steps = steps, self.steps()
        return []

    def saved(self) -> dict[int, Saved]:
        """What is known of the checkpoints that have checksums, by step."""
        return {step: self._saved(step) for step in self.whole_steps()}

    def run_info(self, step: int) -> dict[str, Any]:
        """What `complete` was told of the run."""
        info = self._read(step).get("run")
        if not isinstance(info, dict):
            raise ValueError(f"{_RUN_INFO} says nothing of the run")
        return info

    def begin(self, step: int) -> None:
        """Makes the empty folder of a checkpoint to be written."""
        path = self.unfinished(step)
        if os.path.exists(path):
            shutil.rmtree(path)
        os.makedirs(path)

    def complete(self, step: int, run_info: dict[str, Any], saved: Saved) -> None:
        """Makes a checkpoint of what is written.

        Args:
            step: Its step, of which there is no checkpoint yet.
            run_info: What is to be known of the run; JSON must be able to hold it.
            saved: What is to be known of the checkpoint.
        """
        path = self.unfinished(step)
        content = dataclasses.asdict(saved) | {"run": run_info}
        write_atomically(os.path.join(path, _RUN_INFO), json.dumps(content, indent=1))
        write_checksums(path)
        os.rename(path, self.of_step(step))

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints; if this is interrupted, what is left is no checkpoint any more."""
        for path in (self.of_step(step) for step in steps):
            if os.path.exists(path):  # Somebody may have taken it away.
                os.rename(path, path + _REMOVED)
                shutil.rmtree(path + _REMOVED)

    def remove_leftovers(self) -> list[int]:
        """Removes what a killed run left half written or half removed.

        Returns:
            The steps of those that were half written.
        """
        unfinished = []
        for name in self._names():
            stem, suffix = os.path.splitext(name)
            step = step_of_name(stem)
            if step is not None and suffix in (_UNFINISHED, _REMOVED):
                shutil.rmtree(os.path.join(self.path, name))
                if suffix == _UNFINISHED:
                    unfinished.append(step)
        return sorted(unfinished)

    def set_aside(self, step: int, name: str) -> str:
        """Moves a checkpoint into a folder of that name beside this one; returns to where."""
        parent = self._beside(name)
        os.makedirs(parent, exist_ok=True)
        path, number = os.path.join(parent, str(step)), 1
        while os.path.lexists(path):
            number += 1
            path = os.path.join(parent, f"{step}-{number}")
        shutil.move(self.of_step(step), path)  # The folder may be a link to another disk.
        return path

    def describe_unusable(self, unconfirmed: list[int], damages: Mapping[int, str]) -> str:
        """Says why a run that has checkpoints cannot go on.

        Args:
            unconfirmed: The steps of those that are not confirmed.
            damages: What is wrong with the others, by step.

        Returns:
            A sentence.
        """
        if not unconfirmed:
            listed = "; ".join(f"step {step}: {damage}" for step, damage in damages.items())
            return (
                f"every checkpoint in {self.path} is damaged ({listed}): repair one, or take the"
                " folder away to begin anew"
            )
        reasons = {step: "steps before it were not sound" for step in unconfirmed} | damages
        listed = "; ".join(f"step {step}: {reason}" for step, reason in sorted(reasons.items()))
        return (
            f"no checkpoint in {self.path} is confirmed and whole ({listed}): take the folder away"
            " to begin anew, with a lower schedule.peak_lr, say, or set trainer.confirm_steps=0 to"
            " go on from the last whole one as it is"
        )

    def forget_aside(self, name: str) -> None:
        """Removes what earlier calls of `set_aside` have moved into a folder."""
        if os.path.exists(self._beside(name)):
            shutil.rmtree(self._beside(name))

    def _beside(self, name: str) -> str:
        return os.path.join(os.path.dirname(os.path.abspath(self.path)), name)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def _saved(self, step: int) -> Saved:
        try:
            info = self._read(step)
            # Versions before did not judge the steps.
            known = {field: info[field] for field in ("confirmed", "soundness") if field in info}
            return Saved(info["val_loss"], info["for_ever"], **known)
        except (OSError, ValueError, KeyError, TypeError):
            return Saved()  # It is damaged, and so it is not the best.

    def _read(self, step: int) -> dict[str, Any]:
        return read_json(inner_path(self.of_step(step), _RUN_INFO))


class CheckpointGone(OSError):
    """A checkpoint was removed before it could be read."""


@contextlib.contextmanager
def reading_checkpoint(directory: str, step: int) -> Iterator[None]:
    """Tells a checkpoint that was removed while it was read from one that is damaged.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        CheckpointGone: If the block raises an OSError and the checkpoint is not there any more; in
            all processes, in all of which the block must raise one.
    """
    folder = CheckpointFolder(directory).of_step(step)
    before = _identity(folder)
    try:
        yield
    except OSError as error:
        # Another checkpoint may be in its place, if the run went back to an earlier step.
        if from_first_process(lambda: before is None or _identity(folder) != before):
            message = f"there is no checkpoint of step {step} in {directory} (any more)"
            raise CheckpointGone(message) from error
        raise


def _identity(folder: str) -> tuple[int, int] | None:
    """What another folder of this name would not have; None if there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
