"""Reading checkpoints of a run that may be going on, and removing its old ones meanwhile."""

import contextlib
import os
from collections.abc import Iterator

from xlstm.trainer.base.checkpoint_folder import CheckpointFolder
from xlstm.trainer.base.first_process import from_first_process


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
