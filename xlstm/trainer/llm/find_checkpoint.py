"""Finds the checkpoint that a path stands for, of a run that may be going on."""

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
    """The run and the step that the folder of a run, or of one of its checkpoints, stands for.

    Args:
        path: The folder; it need not be there.

    Returns:
        The run's folder, and the step; None if it is not that of a checkpoint.
    """
    if os.path.isdir(Workdir(path).checkpoints):  # A run, whatever its name.
        return Workdir(path), None
    parent, name = os.path.split(os.path.normpath(path))
    step = parse_step(name)
    if step is not None and os.path.basename(parent) == "checkpoints":
        return Workdir(os.path.dirname(parent)), step
    return Workdir(path), None


def find_checkpoint(
    path: str, report: Callable[[str], None] = lambda text: None
) -> tuple[Workdir, int]:
    """Finds a checkpoint by the folder of its run, or its own.

    Args:
        path: The folder. For that of a run it is the last checkpoint that is confirmed.
        report: Takes a line about a newer one that is not.

    Returns:
        The run's folder and the step.

    Raises:
        ValueError: If the folder does not exist, or has no checkpoint, or one that is a link that
            leads out of the run's folder.
    """
    workdir, wanted = split_checkpoint_path(path)
    folder = CheckpointFolder(workdir.checkpoints)

    def find() -> tuple[list[int], int | None]:
        saved = folder.metadata()
        return list(saved), confirmed_step(saved)

    # The run may be going on: all processes must choose the same.
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
    """Returns the message that a path is no checkpoint, and which ones its run has."""
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
