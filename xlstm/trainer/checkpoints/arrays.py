"""The arrays of a checkpoint: those of a train state, and those that are stored."""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore

from xlstm.common_types import PyTree, TrainState
from xlstm.files import read_json
from xlstm.trainer.base.param_utils import reboxed, unboxed
from xlstm.trainer.checkpoints.storage import literal_path_handler


def stored_arrays(
    path: str, expected: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, Any]:
    """Finds out which arrays lie in a folder, and that they can be read from the first to the last.

    Args:
        path: The folder.
        expected: The arrays that have to be there, by name; None for whatever its list names.

    Returns:
        What Orbax knows of the arrays by name, a `shape` and a `dtype` among it.

    Raises:
        ValueError: If something is missing, or is not what was expected; it names the first array.
            Or the arrays are not parts of one database, which no name of theirs can lead out of.
        Exception: Whatever storage raises.
    """
    # Arrays of the other layout are folders by name, and Orbax joins whatever is written there.
    if read_json(os.path.join(path, "_METADATA")).get("use_ocdbt") is not True:
        raise ValueError(f"{path} was not written by this program: it is no OCDBT store")
    files = dict(_stored_parts(path))
    for name in expected or ():
        if f"{name}/.zarray" not in files:
            raise ValueError(f"the array {name} is missing")
    try:
        arrays = literal_path_handler().metadata(pathlib.Path(path)).tree
    except Exception as error:  # Orbax raises whatever comes of a list that is none.
        raise ValueError(f"the arrays that it lists cannot be opened ({error})") from error
    for name, wanted in (expected or {}).items():
        array = arrays.get(name)
        if array is None or (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"the array {name} is not listed as the one of the shape {wanted.shape} and the"
                f" type {wanted.dtype} that was written"
            )
    sizes = {}
    for name, array in arrays.items():
        _check_parts(name, array, len(files))
        keys = [f"{name}/{part}" for part in _part_names(array)]
        missing = sum(key not in files for key in keys)
        if missing:
            raise ValueError(f"{missing} of {len(keys)} parts of the array {name} are missing")
        for file, end in filter(None, (files[key] for key in keys)):
            if file not in sizes:
                sizes[file] = _size(os.path.join(path, file))
            if sizes[file] < end:
                raise ValueError(f"{file}, which holds a part of the array {name}, is cut or gone")
    return arrays


def _check_parts(name: str, array: Any, num_stored: int) -> None:
    """Checks that neither the parts of an array nor one of them are more than there may be."""
    parts = array.storage.chunk_shape
    count = math.prod(-(-size // part) for size, part in zip(array.shape, parts, strict=True))
    if count > num_stored or math.prod(parts) > max(math.prod(array.shape), 1):
        raise ValueError(
            f"the array {name} of the shape {tuple(array.shape)} cannot be made of {num_stored}"
            f" parts of the shape {tuple(parts)}"
        )


def _part_names(array: Any) -> Iterator[str]:
    """The names that an array's parts have in the database: their places in the grid."""
    pairs = zip(array.shape, array.storage.chunk_shape, strict=True)
    grid = (range(math.ceil(size / part)) for size, part in pairs)
    return (".".join(map(str, place)) or "0" for place in itertools.product(*grid))


def _stored_parts(path: str) -> Iterator[tuple[str, tuple[str, int] | None]]:
    """The keys of a database, each with the file and the end of its value in it.

    There is none if it lies in the tree itself.
    """
    folder = {"driver": "file", "path": os.path.join(path, "")}
    base = tensorstore.KvStore.open(folder).result()
    nodes = [("", tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"].get("location"))]
    while nodes:
        prefix, location = nodes.pop()
        for entry in tensorstore.ocdbt.dump(base, node=location).result()["entries"]:
            if "location" in entry:
                nodes.append((prefix + entry["subtree_common_prefix"].decode(), entry["location"]))
                continue
            place = None
            if "indirect_value" in entry:  # kind:folder:file:begin:length
                _, parent, name, begin, length = entry["indirect_value"].split(":")
                place = parent + name, int(begin) + int(length)
            yield prefix + entry["key"].decode(), place


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return -1


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
