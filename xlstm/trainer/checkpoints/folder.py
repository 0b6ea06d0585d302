"""The folder of a run's checkpoints: one folder per step, renamed when it is complete.

Only process 0 changes anything in it.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from xlstm.files import inner_path, read_json, write_atomically
from xlstm.trainer.base.multihost import broadcast_from_process_0
from xlstm.trainer.checkpoints.checksums import has_checksums, write_checksums
from xlstm.trainer.checkpoints.storage import check_storage_path

_RUN_INFO = "run_info.json"
_UNFINISHED, _REMOVED = ".unfinished", ".removed"


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Facts about a checkpoint that are read without its arrays.

    Attributes:
        val_loss: Validation loss after its step, if known.
        permanent: Whether it is never removed, even if the run's configuration changes.
        confirmed: Whether the steps up to it were sound, see `Soundness`. Runs resume only from
            confirmed checkpoints.
        soundness: Argument of `Soundness.from_dict`.
    """

    val_loss: float | None = None
    permanent: bool = False
    confirmed: bool = True
    soundness: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields under their keys in the file; JSON can represent them."""
        return {
            "val_loss": self.val_loss,
            "for_ever": self.permanent,
            "confirmed": self.confirmed,
            "soundness": self.soundness,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Inverts `to_dict`; raises KeyError if a field is missing."""
        # Older versions did not judge the steps.
        judged = {name: fields[name] for name in ("confirmed", "soundness") if name in fields}
        return cls(fields["val_loss"], fields["for_ever"], **judged)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Policy that decides which checkpoints to keep.

    Attributes:
        max_to_keep: Number of latest confirmed checkpoints to keep. The latest checkpoint is also
            kept if it is not confirmed.
        keep_period: Checkpoints at multiples of this step are kept permanently; 0 disables.
        keep_best: Whether to also keep the confirmed checkpoint with the lowest validation loss.
    """

    max_to_keep: int
    keep_period: int = 0
    keep_best: bool = False

    def is_permanent(self, step: int) -> bool:
        """Returns whether a new checkpoint of a step is kept permanently."""
        return self.keep_period > 0 and step % self.keep_period == 0

    def kept(self, metadata: Mapping[int, CheckpointMetadata]) -> dict[int, CheckpointMetadata]:
        """Returns the checkpoints to keep, by step, of those given."""
        confirmed = [step for step in sorted(metadata) if metadata[step].confirmed]
        kept = {*confirmed[-self.max_to_keep :], max(metadata)}
        kept |= {step for step in metadata if metadata[step].permanent}
        best = best_step(metadata)
        if self.keep_best and best is not None:
            kept.add(best)
        return {step: metadata[step] for step in sorted(kept)}


def best_step(metadata: Mapping[int, CheckpointMetadata]) -> int | None:
    """Returns the confirmed step with the lowest validation loss; the first one of a tie.

    Steps that are not confirmed do not compete: they are set aside when the run resumes.

    Args:
        metadata: Metadata of checkpoints by step.

    Returns:
        The step; None if no loss is known.
    """
    confirmed = {step: metadata[step] for step in sorted(metadata) if metadata[step].confirmed}
    losses = {step: x.val_loss for step, x in confirmed.items() if x.val_loss is not None}
    return min(losses, key=losses.get, default=None)


def confirmed_step(metadata: Mapping[int, CheckpointMetadata]) -> int | None:
    """Returns the step of the latest confirmed checkpoint; None if there is none."""
    return max((step for step in metadata if metadata[step].confirmed), default=None)


def parse_step(name: str) -> int | None:
    """Returns the step of the checkpoint folder with this name; None for any other name."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a run's checkpoints.

    Attributes:
        path: The folder; it need not exist.
    """

    path: str

    def __post_init__(self):
        """Raises ValueError if arrays cannot be stored in the folder."""
        check_storage_path(self.path)

    def step_dir(self, step: int) -> str:
        """Returns the folder of a checkpoint."""
        return os.path.join(self.path, str(step))

    def unfinished_dir(self, step: int) -> str:
        """Returns the folder of a checkpoint while it is being written."""
        return self.step_dir(step) + _UNFINISHED

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, damaged ones too, in ascending order."""
        steps = map(parse_step, self._names())
        return sorted(step for step in steps if step is not None)

    def num_bytes(self) -> int:
        """Returns the size of all files."""
        paths = [
            os.path.join(root, name) for root, _, names in os.walk(self.path) for name in names
        ]
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def complete_steps(self) -> list[int]:
        """Returns the steps of the checkpoints that have checksums, in ascending order."""
        before, steps = None, self.steps()
        while steps != before:  # A running run may have replaced all of them in between.
            complete = [step for step in steps if has_checksums(self.step_dir(step))]
            if complete:
                return complete
            before, steps = steps, self.steps()
        return []

    def metadata(self) -> dict[int, CheckpointMetadata]:
        """Returns the metadata of the checkpoints that have checksums, by step."""
        return {step: self._read_metadata(step) for step in self.complete_steps()}

    def run_info(self, step: int) -> dict[str, Any]:
        """Returns the `run_info` that `finalize` wrote."""
        info = self._read_info(step).get("run")
        if not isinstance(info, dict):
            raise ValueError(f'{_RUN_INFO} has no object under the key "run"')
        return info

    def begin(self, step: int) -> None:
        """Creates the empty folder of a checkpoint that is to be written."""
        path = self.unfinished_dir(step)
        if os.path.exists(path):
            shutil.rmtree(path)
        os.makedirs(path)

    def finalize(self, step: int, run_info: dict[str, Any], metadata: CheckpointMetadata) -> None:
        """Turns the unfinished folder of a step into a checkpoint.

        Args:
            step: Its step, which must have no checkpoint yet.
            run_info: Facts about the run; JSON must be able to represent them.
            metadata: Facts about the checkpoint.
        """
        path = self.unfinished_dir(step)
        content = metadata.to_dict() | {"run": run_info}
        write_atomically(os.path.join(path, _RUN_INFO), json.dumps(content, indent=1))
        write_checksums(path)
        os.rename(path, self.step_dir(step))

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints; if interrupted, the remaining files no longer count as one."""
        for path in (self.step_dir(step) for step in steps):
            if os.path.exists(path):  # Somebody else may have removed it.
                os.rename(path, path + _REMOVED)
                shutil.rmtree(path + _REMOVED)

    def remove_leftovers(self) -> list[int]:
        """Removes what a killed run left unfinished or partly removed.

        Returns:
            The steps of the unfinished ones.
        """
        unfinished = []
        for name in self._names():
            stem, suffix = os.path.splitext(name)
            step = parse_step(stem)
            if step is not None and suffix in (_UNFINISHED, _REMOVED):
                shutil.rmtree(os.path.join(self.path, name))
                if suffix == _UNFINISHED:
                    unfinished.append(step)
        return sorted(unfinished)

    def set_aside(self, step: int, name: str) -> str:
        """Moves a checkpoint into a sibling folder with this name; returns its new path."""
        parent = self._sibling(name)
        os.makedirs(parent, exist_ok=True)
        path, number = os.path.join(parent, str(step)), 1
        while os.path.lexists(path):
            number += 1
            path = os.path.join(parent, f"{step}-{number}")
        shutil.move(self.step_dir(step), path)  # The folder may be a link to another disk.
        return path

    def clear_set_aside(self, name: str) -> None:
        """Removes the checkpoints that were set aside in the sibling folder with this name."""
        if os.path.exists(self._sibling(name)):
            shutil.rmtree(self._sibling(name))

    def describe_unusable(self, unconfirmed: list[int], damages: Mapping[int, str]) -> str:
        """Describes why a run that has checkpoints cannot resume from any of them.

        Args:
            unconfirmed: The steps that are not confirmed.
            damages: What is wrong with each of the other checkpoints, by step.

        Returns:
            A sentence.
        """
        if not unconfirmed:
            listed = "; ".join(f"step {step}: {damage}" for step, damage in damages.items())
            return (
                f"every checkpoint in {self.path} is damaged ({listed}): repair one, or move the"
                " folder away to start from scratch"
            )
        reasons = {step: "steps before it were not sound" for step in unconfirmed} | damages
        listed = "; ".join(f"step {step}: {reason}" for step, reason in sorted(reasons.items()))
        return (
            f"no checkpoint in {self.path} is both confirmed and undamaged ({listed}): move the"
            " folder away to start from scratch, for example with a lower schedule.peak_lr, or set"
            " trainer.confirm_steps=0 to resume from the latest undamaged one"
        )

    def _sibling(self, name: str) -> str:
        return os.path.join(os.path.dirname(os.path.abspath(self.path)), name)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def _read_metadata(self, step: int) -> CheckpointMetadata:
        try:
            return CheckpointMetadata.from_dict(self._read_info(step))
        except (OSError, ValueError, KeyError, TypeError):
            return CheckpointMetadata()  # It is damaged: without a loss it is not the best.

    def _read_info(self, step: int) -> dict[str, Any]:
        return read_json(inner_path(self.step_dir(step), _RUN_INFO))


class CheckpointGone(OSError):
    """Raised if a checkpoint was removed before it was read."""


@contextlib.contextmanager
def reading_checkpoint(directory: str, step: int) -> Iterator[None]:
    """Distinguishes a checkpoint that was removed while being read from a damaged one.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        CheckpointGone: In all processes, if the block raises an OSError and the checkpoint no
            longer exists. The block must then raise one in all processes.
    """
    folder = CheckpointFolder(directory).step_dir(step)
    before = _identity(folder)
    try:
        yield
    except OSError as error:
        # If the run went back to an earlier step, another checkpoint may have the same path.
        if broadcast_from_process_0(lambda: before is None or _identity(folder) != before):
            message = f"there is no checkpoint of step {step} in {directory} (any more)"
            raise CheckpointGone(message) from error
        raise


def _identity(folder: str) -> tuple[int, int] | None:
    """Returns what distinguishes a folder from any other at this path; None if there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
