"""Reads the parameters alone of a checkpoint, for all that is not training."""

import os

import jax
import orbax.checkpoint as ocp

from xlstm.common_types import PyTree
from xlstm.trainer.base.checkpoint_arrays import arrays_to_read
from xlstm.trainer.base.checkpoint_folder import CheckpointFolder
from xlstm.trainer.base.checkpointing import ITEM, reported, restore_arguments
from xlstm.trainer.base.checksums import find_damage
from xlstm.trainer.base.param_utils import path_name, reboxed, unboxed


def read_params(directory: str, step: int, like: PyTree) -> PyTree:
    """Reads the parameters of a checkpoint: their moving average, if there is one.

    Args:
        directory: The folder of a run's checkpoints; nothing in it is changed.
        step: The checkpoint's step.
        like: Boxed parameters with the shapes and shardings wanted; abstract ones do.

    Returns:
        The parameters, placed as `like` is.

    Raises:
        OSError: If there is no such checkpoint, it is damaged, or it is of another model.
    """
    path = os.path.abspath(CheckpointFolder(directory).of_step(step))
    what = f"the checkpoint of step {step} in {directory} cannot be used"
    if not os.path.isdir(path):
        raise OSError(f"there is no checkpoint of step {step} in {directory}")
    damage = find_damage(path)
    if damage:
        raise OSError(f"{what}: {damage}")
    with reported(what), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = os.path.join(path, ITEM)
        saved = checkpointer.metadata(path).item_metadata.tree
        has_average = any(name.startswith("params_ema.") for name in saved)
        prefix = "params_ema" if has_average else "params"
        leaves, structure = jax.tree_util.tree_flatten_with_path(unboxed(like))
        wanted = {f"{prefix}.{path_name(key)}": leaf for key, leaf in leaves}
        saved = {name: x for name, x in saved.items() if name.startswith(f"{prefix}.")}
        target = arrays_to_read(wanted, saved)
        arrays = checkpointer.restore(path, args=restore_arguments(target))
    return reboxed(jax.tree.unflatten(structure, [arrays[name] for name in wanted]), like)
