"""Reads the newest checkpoint of a run that may be going on."""

from collections.abc import Callable
from typing import TypeVar

from xlstm.trainer.checkpoints.folder import CheckpointGone
from xlstm.trainer.llm.workdir import Workdir, find_checkpoint, split_checkpoint_path

_TRIES = 5
_Read = TypeVar("_Read")


def read_checkpoint(
    path: str,
    read: Callable[[Workdir, int], _Read],
    report: Callable[[str], None] = lambda text: None,
) -> _Read:
    """Reads the checkpoint that a path stands for, the same in all processes.

    If that of a run's folder is removed meanwhile, since the run goes on, the one that is the
    newest then is read; one that was named itself is not replaced.

    Args:
        path: The folder of a run, or of one of its checkpoints.
        read: Reads the checkpoint, given the run's folder and the step.
        report: Takes a line about a newer checkpoint that is not confirmed.

    Returns:
        What `read` returned.

    Raises:
        ValueError: If there is none.
        OSError: If it cannot be read, or the run removes one after the other.
    """
    for _ in range(_TRIES):
        workdir, step = find_checkpoint(path, report)
        try:
            return read(workdir, step)
        except CheckpointGone as error:
            if split_checkpoint_path(path)[1] is not None:
                raise
            last_error = error
    raise OSError(
        f"{path}: {_TRIES} checkpoints were removed while they were read: let the run keep more of"
        " them (trainer.max_checkpoints), or read a copy"
    ) from last_error
