"""The flags `--checkpoint` and `--mesh`, of the tools that use a trained model."""

import dataclasses
import re
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import flags

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import MESH_AXES
from xlstm.tools.command_line import print_note, resolve_path
from xlstm.trainer.base.param_utils import count_nonfinite, nonfinite_text
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.workdir import Workdir, load_run_config

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a run, for its last checkpoint, or of one of its checkpoints."
)
_Result = TypeVar("_Result")
_MESH = flags.DEFINE_list("mesh", [], "Sizes of the mesh, such as fsdp=4,tp=2 [dp alone].")


def checkpoint_path() -> str:
    """The absolute path of the checkpoint; raises ValueError if the flag is missing."""
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint is missing: name the folder of a run")
    return resolve_path(_CHECKPOINT.value)


def use_checkpoint(path: str, use: Callable[[RunConfig, Workdir, int], _Result]) -> _Result:
    """Reads a checkpoint; see `read_checkpoint`.

    Args:
        path: What `checkpoint_path` returned.
        use: Reads it, given the run's configuration, but for the mesh, which is that of the flag;
            its folder; the step.

    Returns:
        What `use` returned.

    Raises:
        ValueError: If there is no such checkpoint, or a flag cannot be.
        OSError: If it cannot be read.
    """

    def use_configured(workdir: Workdir, step: int) -> _Result:
        config = load_run_config(workdir)
        mesh = dataclasses.replace(config.mesh, **_mesh_sizes())
        return use(dataclasses.replace(config, mesh=mesh), workdir, step)

    return read_checkpoint(path, use_configured, _note_in_first_process)


def note_nonfinite(params: PyTree) -> None:
    """Tells which parameters are infinite or NaN, if any are; in the first process."""
    counts = count_nonfinite(params)
    if counts:
        _note_in_first_process(nonfinite_text(counts))


def _note_in_first_process(text: str) -> None:
    """Prints a note, once for all processes."""
    if jax.process_index() == 0:
        print_note(text)


def _mesh_sizes() -> dict[str, int]:
    """The size of every mesh axis."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {"dp": -1}
    for entry in _MESH.value:
        axis, _, size = entry.partition("=")
        if axis not in sizes or not re.fullmatch("-?[0-9]{1,9}", size):
            raise ValueError(f"--mesh has {entry!r}: write sizes as fsdp=4,tp=2")
        sizes[axis] = int(size)
    return sizes
