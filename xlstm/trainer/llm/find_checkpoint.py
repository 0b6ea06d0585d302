"""Finding and reading a checkpoint by a path, even while its run is training."""

import os
from collections.abc import Callable
from typing import TypeVar

from xlstm.files import check_inside
from xlstm.trainer.base.multihost import broadcast_from_process_0
from xlstm.trainer.checkpoints.folder import (
    CheckpointFolder,
    CheckpointGone,
    confirmed_step,
    parse_step,
)
from xlstm.trainer.llm.workdir import Workdir

_TRIES = 5
_Read = TypeVar("_Read")


def split_checkpoint_path(path: str) -> tuple[Workdir, int | None]:
    """Splits the path of a run's folder, or of one of its checkpoints, into folder and step.

    Args:
        path: The path; it need not exist.

    Returns:
        The run's folder, and the step; None if the path is not that of a checkpoint.
    """
    if os.path.isdir(Workdir(path).checkpoints):  # A run's folder, even if named like a checkpoint.
        return Workdir(path), None
    parent, name = os.path.split(os.path.normpath(path))
    step = parse_step(name)
    if step is not None and os.path.basename(parent) == "checkpoints":
        return Workdir(os.path.dirname(parent)), step
    return Workdir(path), None


def find_checkpoint(
    path: str, report: Callable[[str], None] = lambda text: None
) -> tuple[Workdir, int]:
    """Finds the checkpoint that a path names.

    Args:
        path: The folder of a run, for its last confirmed checkpoint, or of a checkpoint.
        report: Called with a line about a newer checkpoint that is not confirmed.

    Returns:
        The run's folder and the step.

    Raises:
        ValueError: If the folder does not exist, has no complete or no confirmed checkpoint, or if
            a file to read is a link that leads out of the run's folder.
    """
    workdir, wanted = split_checkpoint_path(path)
    folder = CheckpointFolder(workdir.checkpoints)

    def find() -> tuple[list[int], int | None]:
        saved = folder.metadata()
        return list(saved), confirmed_step(saved)

    # The run may be training: all processes must choose the same checkpoint.
    steps, confirmed = broadcast_from_process_0(find)
    if wanted is None and steps:
        newest, wanted = max(steps), confirmed
        unsure = f"{folder.step_dir(newest)} is not confirmed, since steps before it were not sound"
        if confirmed is None:
            raise ValueError(
                f"{path}: there is no confirmed checkpoint. {unsure}: name it to use it as it is"
            )
        if newest != confirmed:
            report(f"{unsure}: the checkpoint of step {confirmed} is used")
    if wanted not in steps:
        raise ValueError(_describe_missing(path, wanted, steps))
    checkpoint = CheckpointFolder(workdir.checkpoints).step_dir(wanted)
    for used in (workdir.config, workdir.tokenizer, checkpoint):
        check_inside(workdir.path, used)
    return workdir, wanted


def _describe_missing(path: str, step: int | None, steps: list[int]) -> str:
    """Returns the message that a path is no checkpoint, with those that its run has."""
    expected = "expected the folder of a run or of one of its checkpoints"
    if steps:
        expected = f"the run has the checkpoints {', '.join(map(str, sorted(steps)))}"
    if not os.path.exists(path):
        return f"{path} does not exist: {expected}"
    if step is None:
        return f"{path} has no complete checkpoint: {expected}"
    return f"{path} is not a complete checkpoint: {expected}"


def read_checkpoint(
    path: str,
    read: Callable[[Workdir, int], _Read],
    report: Callable[[str], None] = lambda text: None,
) -> _Read:
    """Reads the checkpoint that a path names, the same in all processes.

    If a run that is training removes its checkpoint meanwhile, the one that is the last confirmed
    checkpoint then is read. A checkpoint that the path itself names is not replaced.

    Args:
        path: The folder of a run, or of one of its checkpoints.
        read: Reads the checkpoint, given the run's folder and the step.
        report: Called with a line about a newer checkpoint that is not confirmed.

    Returns:
        The result of `read`.

    Raises:
        ValueError: If there is no such checkpoint.
        OSError: If the checkpoint cannot be read, or the run has removed several in a row.
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
        f"{path}: {_TRIES} checkpoints were removed while they were read: let the run keep more"
        " checkpoints (trainer.max_checkpoints), or read a copy of its folder"
    ) from last_error
