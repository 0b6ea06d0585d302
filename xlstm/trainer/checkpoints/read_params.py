"""Reading of checkpoints outside of training: parameters, facts about the run, a fingerprint."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore

from xlstm.common_types import PyTree
from xlstm.files import file_checksum
from xlstm.trainer.base.multihost import broadcast_from_process_0, raise_on_all_processes
from xlstm.trainer.base.param_utils import path_name, reboxed, unboxed
from xlstm.trainer.checkpoints.arrays import arrays_to_read, read_array_metadata
from xlstm.trainer.checkpoints.checksums import CHECKSUMS, find_damage
from xlstm.trainer.checkpoints.folder import CheckpointFolder, reading_checkpoint
from xlstm.trainer.checkpoints.storage import (
    STATE_DIR,
    as_os_error,
    literal_path_handler,
    restore_arguments,
)
from xlstm.trainer.checkpoints.streamed_arrays import open_streamed_arrays


def read_params(directory: str, step: int, like: PyTree) -> PyTree:
    """Reads the parameters of a checkpoint, or their moving average if it has one.

    Args:
        directory: The folder of a run's checkpoints; it is not changed.
        step: The checkpoint's step.
        like: Boxed parameters with the shapes and shardings wanted; may be abstract.

    Returns:
        The parameters, sharded like `like`.

    Raises:
        CheckpointGone: If the checkpoint does not exist (any more).
        OSError: If it is damaged, or from another model.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(unboxed(like))
    with _open_checkpoint(directory, step) as (checkpointer, path):
        target = _select(path, {path_name(key): leaf for key, leaf in leaves})
        arrays = checkpointer.restore(path, args=restore_arguments(target))
    return reboxed(jax.tree.unflatten(structure, [arrays[name] for name in target]), like)


def open_params(
    directory: str, step: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tensorstore.TensorStore]:
    """Opens the parameters of a checkpoint for reading in chunks.

    Args:
        directory: See `read_params`.
        step: The checkpoint's step.
        shapes: The shapes of the parameters by name, see `path_name`.

    Returns:
        The parameters, or their moving average, in the order of `shapes`; see
        `open_streamed_arrays`.

    Raises:
        CheckpointGone: See `read_params`.
        OSError: See `read_params`.
    """
    wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with _open_checkpoint(directory, step) as (_, path):
        target = _select(path, wanted)
        arrays = open_streamed_arrays(path, target)
    return dict(zip(shapes, (arrays[name] for name in target), strict=True))


@contextlib.contextmanager
def _open_checkpoint(directory: str, step: int) -> Iterator[tuple[ocp.Checkpointer, str]]:
    """Yields a reader of a checkpoint, after comparing checksums, and the folder of its arrays."""
    path = os.path.abspath(CheckpointFolder(directory).step_dir(step))
    what = f"the checkpoint of step {step} in {directory} cannot be used"
    # No process may wait for another one, which may have failed.
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    with reading_checkpoint(directory, step):
        damage = broadcast_from_process_0(lambda: find_damage(path))
        if damage:
            raise OSError(f"{what}: {damage}")
        with (
            raise_on_all_processes(),
            as_os_error(what),
            ocp.Checkpointer(literal_path_handler(), multiprocessing_options=alone) as checkpointer,
        ):
            yield checkpointer, os.path.join(path, STATE_DIR)


def _select(path: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters wanted, in order, under their names in the checkpoint."""
    saved = read_array_metadata(path)
    has_ema = any(name.startswith("params_ema.") for name in saved)
    prefix = "params_ema" if has_ema else "params"
    wanted = {f"{prefix}.{name}": x for name, x in wanted.items()}
    saved = {name: x for name, x in saved.items() if name.startswith(f"{prefix}.")}
    return arrays_to_read(wanted, saved)


@contextlib.contextmanager
def _reading(directory: str, step: int) -> Iterator[None]:
    """Handles errors of a block in which all processes read from a checkpoint."""
    what = f"the checkpoint of step {step} in {directory} cannot be read"
    with reading_checkpoint(directory, step), raise_on_all_processes(), as_os_error(what):
        yield


def read_run_info(directory: str, step: int) -> dict[str, Any]:
    """Returns the `run_info` of the run that wrote a checkpoint.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        CheckpointGone: If the checkpoint does not exist (any more).
        OSError: If one of the processes cannot read it.
    """
    with _reading(directory, step):
        return CheckpointFolder(directory).run_info(step)


def read_fingerprint(directory: str, step: int) -> str:
    """Returns a fingerprint that no other checkpoint has: a hash of its file of checksums.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        CheckpointGone: See `read_run_info`.
        OSError: See `read_run_info`.
    """
    path = os.path.join(CheckpointFolder(directory).step_dir(step), CHECKSUMS)
    with _reading(directory, step):
        return file_checksum(path).sha256
