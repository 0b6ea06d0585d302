"""The flags `--checkpoint` and `--mesh` of tools that use a trained model."""

import re
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import flags

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import MESH_AXES
from xlstm.inference.load_model import read_run
from xlstm.tools.command_line import print_note, resolve_path
from xlstm.trainer.base.param_utils import count_nonfinite, nonfinite_text
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.workdir import Workdir

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a run, to use its last confirmed checkpoint, or of one of its checkpoints.",
)
_MESH = flags.DEFINE_list(
    "mesh",
    [],
    "Sizes of mesh axes, such as fsdp=4,tp=2. The remaining devices become replicas (dp).",
)
_Result = TypeVar("_Result")


def checkpoint_path() -> str:
    """Returns the absolute path of `--checkpoint`; raises ValueError if the flag is missing."""
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint is missing: expected the folder of a run")
    return resolve_path(_CHECKPOINT.value)


def mesh_sizes() -> dict[str, int]:
    """Returns the sizes of the mesh axes that `--mesh` names.

    Raises:
        ValueError: If the flag is malformed.
    """
    sizes = {}
    for entry in _MESH.value:
        axis, _, size = entry.partition("=")
        if axis not in MESH_AXES or not re.fullmatch("-?[0-9]{1,9}", size):
            raise ValueError(f"--mesh has {entry!r}: expected sizes, such as fsdp=4,tp=2")
        sizes[axis] = int(size)
    return sizes


def use_checkpoint(path: str, use: Callable[[RunConfig, Workdir, int], _Result]) -> _Result:
    """Reads a checkpoint with the mesh that `--mesh` chooses; see `read_run`.

    Args:
        path: Result of `checkpoint_path`.
        use: Reads the checkpoint, given the run's configuration with that mesh, the run's folder
            and the step.

    Returns:
        What `use` returned.

    Raises:
        ValueError: If there is no such checkpoint, or `--mesh` is malformed.
        OSError: If the checkpoint cannot be read.
    """
    return read_run(path, use, mesh=mesh_sizes(), report=note_once)


def note_nonfinite(params: PyTree) -> None:
    """Prints a note, in process 0, that names parameters that are infinite or NaN."""
    counts = count_nonfinite(params)
    if counts:
        note_once(nonfinite_text(counts))


def note_once(text: str) -> None:
    """Prints a note in process 0."""
    if jax.process_index() == 0:
        print_note(text)
