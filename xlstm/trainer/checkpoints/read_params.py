"""Reads what lies in a checkpoint, for all that is not training."""

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
from xlstm.trainer.base.multihost import failing_together, from_first_process
from xlstm.trainer.base.param_utils import path_name, reboxed, unboxed
from xlstm.trainer.checkpoints.arrays import arrays_to_read, stored_arrays
from xlstm.trainer.checkpoints.checksums import CHECKSUMS, find_damage
from xlstm.trainer.checkpoints.folder import CheckpointFolder, reading_checkpoint
from xlstm.trainer.checkpoints.storage import (
    ITEM,
    literal_path_handler,
    reported,
    restore_arguments,
)
from xlstm.trainer.checkpoints.streamed_arrays import open_parts


def read_params(directory: str, step: int, like: PyTree) -> PyTree:
    """Reads the parameters of a checkpoint: their moving average, if there is one.

    Args:
        directory: The folder of a run's checkpoints; nothing in it is changed.
        step: The checkpoint's step.
        like: Boxed parameters with the shapes and shardings wanted; abstract ones do.

    Returns:
        The parameters, placed as `like` is.

    Raises:
        CheckpointGone: If it has been removed meanwhile.
        OSError: If there is no such checkpoint, it is damaged, or it is of another model.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(unboxed(like))
    with _whole_checkpoint(directory, step) as (checkpointer, path):
        target = _saved_names(path, {path_name(key): leaf for key, leaf in leaves})
        arrays = checkpointer.restore(path, args=restore_arguments(target))
    return reboxed(jax.tree.unflatten(structure, [arrays[name] for name in target]), like)


def open_params(
    directory: str, step: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tensorstore.TensorStore]:
    """Opens the parameters of a checkpoint, so that they can be read in parts.

    Args:
        directory: See `read_params`.
        step: The checkpoint's step.
        shapes: The shapes of the parameters by their paths, the parts joined by `.`.

    Returns:
        The parameters, or their moving average, in the order of `shapes`; see `open_parts`.

    Raises:
        OSError: See `read_params`.
    """
    wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with _whole_checkpoint(directory, step) as (_, path):
        target = _saved_names(path, wanted)
        arrays = open_parts(path, target)
    return dict(zip(shapes, (arrays[name] for name in target), strict=True))


@contextlib.contextmanager
def _whole_checkpoint(directory: str, step: int) -> Iterator[tuple[ocp.Checkpointer, str]]:
    """What reads a checkpoint that is as it was written, and the folder of its arrays."""
    path = os.path.abspath(CheckpointFolder(directory).of_step(step))
    what = f"the checkpoint of step {step} in {directory} cannot be used"
    # No process waits for another one that may have failed.
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    with reading_checkpoint(directory, step):
        damage = from_first_process(lambda: find_damage(path))
        if damage:
            raise OSError(f"{what}: {damage}")
        with (
            failing_together(),
            reported(what),
            ocp.Checkpointer(literal_path_handler(), multiprocessing_options=alone) as checkpointer,
        ):
            yield checkpointer, os.path.join(path, ITEM)


def _saved_names(path: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters wanted, in their order, by the names that they have among the arrays."""
    saved = stored_arrays(path)
    has_average = any(name.startswith("params_ema.") for name in saved)
    prefix = "params_ema" if has_average else "params"
    wanted = {f"{prefix}.{name}": x for name, x in wanted.items()}
    saved = {name: x for name, x in saved.items() if name.startswith(f"{prefix}.")}
    return arrays_to_read(wanted, saved)


@contextlib.contextmanager
def _reading(directory: str, step: int) -> Iterator[None]:
    """What all processes read of a checkpoint, which may be removed meanwhile."""
    what = f"the checkpoint of step {step} in {directory} cannot be read"
    with reading_checkpoint(directory, step), failing_together(), reported(what):
        yield


def read_run_info(directory: str, step: int) -> dict[str, Any]:
    """The `run_info` of the run that wrote a checkpoint.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        CheckpointGone: If it has been removed meanwhile.
        OSError: If it cannot be read, by one of the processes.
    """
    with _reading(directory, step):
        return CheckpointFolder(directory).run_info(step)


def read_fingerprint(directory: str, step: int) -> str:
    """What differs between checkpoints that are not the same: a hash of their files' checksums.

    Args:
        directory: The folder of a run's checkpoints.
        step: The checkpoint's step.

    Raises:
        OSError: See `read_run_info`.
    """
    path = os.path.join(CheckpointFolder(directory).of_step(step), CHECKSUMS)
    with _reading(directory, step):
        return file_checksum(path).sha256
