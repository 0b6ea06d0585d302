"""A train state as names and arrays: what of it a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree, TrainState
from xlstm.trainer.base.param_utils import reboxed, unboxed

_FIELDS = ("params", "opt_state", "step", "rng", "params_ema", "grad_norm_mean", "skipped_steps")


def _saved_fields(state: TrainState) -> dict[str, PyTree]:
    fields = {field: getattr(state, field) for field in _FIELDS}
    return {field: tree for field, tree in fields.items() if tree is not None}


def named_arrays(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state by their paths, `params.blocks.norm` and so on.

    There are no boxes in it, so it knows nothing of a mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(_saved_fields(state)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_arrays(state: TrainState, arrays: Mapping[str, jax.Array]) -> TrainState:
    """The inverse of `named_arrays`: the state with other arrays in its boxes."""
    fields = _saved_fields(state)
    structure = jax.tree.structure(unboxed(fields))
    found = jax.tree.unflatten(structure, [arrays[name] for name in named_arrays(state)])
    return state.replace(**reboxed(found, fields))


def arrays_to_read(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Chooses what to read from a checkpoint: all that is wanted, but for an average that it lacks.

    Args:
        wanted: The arrays of the state wanted, by name; anything that has a shape does.
        saved: Those of the checkpoint; an average of the parameters that is not wanted may be
            among them.

    Returns:
        Those of `wanted` to read; `fill_average` makes the others.

    Raises:
        ValueError: If the checkpoint is of another model or optimizer.
    """
    average = {name for name in wanted if _is_average(name)}
    if not average & saved.keys():
        wanted = {name: x for name, x in wanted.items() if name not in average}
    if not average:
        saved = {name: x for name, x in saved.items() if not _is_average(name)}
    for name in sorted(wanted.keys() | saved.keys(), key=_importance):
        here, there = (_shape(arrays.get(name)) for arrays in (wanted, saved))
        if here != there:
            what = f"{name} is {there} there, {here} in this configuration"
            is_optimizer = name.startswith("opt_state.")
            raise ValueError(f"another optimizer wrote it: {what}" if is_optimizer else what)
    return dict(wanted)


def fill_average(
    wanted: Mapping[str, Any], arrays: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Adds the average that a checkpoint lacked: it begins as a copy of the parameters.

    Args:
        wanted: The arrays of the state wanted, by name; anything that has a type does.
        arrays: What was read.

    Returns:
        All that is wanted.
    """
    filled = dict(arrays)
    for name in wanted.keys() - arrays.keys():
        parameter = arrays[name.replace("params_ema", "params", 1)]
        # A true copy: a training step gives both buffers away.
        filled[name] = jnp.copy(parameter).astype(wanted[name].dtype)
    return filled


def _is_average(name: str) -> bool:
    return name.startswith("params_ema.")


def _importance(name: str) -> tuple[bool, str]:
    """Another model has another optimizer state, too: the model comes first."""
    return not name.startswith("params."), name


def _shape(x: Any) -> str:
    if x is None:
        return "missing"
    return f"of the shape {tuple(x.shape)}" if x.shape else "a scalar"
