"""Arrays of a checkpoint: their names in a train state, and their metadata in storage."""

import functools
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

_FIELDS = (
    "params",
    "opt_state",
    "step",
    "rng",
    "params_ema",
    "grad_norm_mean",
    "skipped_steps",
    "carried_state",
)
# Fields that a checkpoint may lack or have in addition, see `fill_missing`.
_OPTIONAL = ("params_ema", "carried_state")


def _saved_fields(state: TrainState) -> dict[str, PyTree]:
    fields = {field: getattr(state, field) for field in _FIELDS}
    return {field: tree for field, tree in fields.items() if tree is not None}


def named_arrays(state: TrainState) -> dict[str, jax.Array]:
    """Returns the arrays of a state by name, for example `params.blocks.norm`.

    They have no boxes, so they do not depend on a mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(_saved_fields(state)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_arrays(state: TrainState, arrays: Mapping[str, jax.Array]) -> TrainState:
    """Inverts `named_arrays`: returns the state with other arrays in its boxes."""
    fields = _saved_fields(state)
    structure = jax.tree.structure(unboxed(fields))
    found = jax.tree.unflatten(structure, [arrays[name] for name in named_arrays(state)])
    return state.replace(**reboxed(found, fields))


def arrays_to_read(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the arrays to read from a checkpoint, which may lack whole fields.

    These are `params_ema` and `carried_state`. It may also have one that is not wanted.

    Args:
        wanted: The arrays of the state wanted, by name; anything with a `shape`.
        saved: The arrays of the checkpoint.

    Returns:
        The arrays of `wanted` to read; `fill_missing` adds the others.

    Raises:
        ValueError: If the checkpoint is from another model or optimizer.
    """
    for field in _OPTIONAL:
        is_wanted, is_saved = (any(_is_of(field, name) for name in x) for x in (wanted, saved))
        if not (is_wanted and is_saved):
            wanted, saved = (
                {name: x for name, x in arrays.items() if not _is_of(field, name)}
                for arrays in (wanted, saved)
            )
    for name in sorted(wanted.keys() | saved.keys(), key=_params_first):
        expected, found = (_shape(arrays.get(name)) for arrays in (wanted, saved))
        if found != expected:
            what = f"{name} is {found} in the checkpoint, {expected} in this configuration"
            is_optimizer = name.startswith("opt_state.")
            raise ValueError(f"it has another optimizer: {what}" if is_optimizer else what)
    return dict(wanted)


def fill_missing(
    wanted: Mapping[str, Any], arrays: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Adds the fields that a checkpoint lacked.

    `params_ema` is a copy of the parameters, and `carried_state` the zero state.

    Args:
        wanted: The arrays of the state wanted, by name.
        arrays: The arrays that were read.

    Returns:
        All arrays of `wanted`.
    """
    filled = dict(arrays)
    for name in wanted.keys() - arrays.keys():
        like = wanted[name]
        if _is_of("carried_state", name):
            zeros = functools.partial(jnp.zeros, like.shape, like.dtype)
            filled[name] = jax.jit(zeros, out_shardings=like.sharding)()
            continue
        parameter = arrays[name.replace("params_ema", "params", 1)]
        # A real copy, since a training step donates both buffers.
        filled[name] = jnp.copy(parameter).astype(like.dtype)
    return filled


def _is_of(field: str, name: str) -> bool:
    return name.startswith(f"{field}.")


def _params_first(name: str) -> tuple[bool, str]:
    """Returns a sort key; another model also has another optimizer state, so name the model."""
    return not name.startswith("params."), name


def _shape(x: Any) -> str:
    if x is None:
        return "missing"
    return f"of shape {tuple(x.shape)}" if x.shape else "a scalar"


def read_array_metadata(
    path: str, expected: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, Any]:
    """Returns the metadata of the arrays in a folder, after checking that they can be read.

    Args:
        path: The folder.
        expected: The arrays that must be there, by name; None accepts those that Orbax lists.

    Returns:
        Orbax's metadata of the arrays by name, with a `shape` and a `dtype`.

    Raises:
        ValueError: If a chunk is missing, an array is not as expected (the first one is named), or
            the folder is not an OCDBT store.
        Exception: Anything that storage raises.
    """
    # In the other format each array is a folder, whose name Orbax takes from the list unchecked.
    if read_json(os.path.join(path, "_METADATA")).get("use_ocdbt") is not True:
        raise ValueError(f"{path} was not written by this program: it is no OCDBT store")
    chunks = dict(_stored_chunks(path))
    for name in expected or ():
        if f"{name}/.zarray" not in chunks:
            raise ValueError(f"the array {name} is missing")
    try:
        arrays = literal_path_handler().metadata(pathlib.Path(path)).tree
    except Exception as error:  # Orbax may raise anything if the list is malformed.
        raise ValueError(f"the arrays that it lists cannot be opened ({error})") from error
    for name, wanted in (expected or {}).items():
        array = arrays.get(name)
        if array is None or (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"the array {name} is not listed with the shape {wanted.shape} and the type"
                f" {wanted.dtype} that was written"
            )
    sizes = {}
    for name, array in arrays.items():
        _check_chunk_shape(name, array, len(chunks))
        keys = [f"{name}/{index}" for index in _chunk_indices(array)]
        missing = sum(key not in chunks for key in keys)
        if missing:
            raise ValueError(f"{missing} of {len(keys)} chunks of the array {name} are missing")
        for file, end in filter(None, (chunks[key] for key in keys)):
            if file not in sizes:
                sizes[file] = _size(os.path.join(path, file))
            if sizes[file] < end:
                raise ValueError(
                    f"{file}, which holds a chunk of the array {name}, is truncated or missing"
                )
    return arrays


def _check_chunk_shape(name: str, array: Any, num_stored: int) -> None:
    """Checks that an array has no more chunks than are stored, and no chunk larger than itself."""
    chunk_shape = array.storage.chunk_shape
    pairs = zip(array.shape, chunk_shape, strict=True)
    count = math.prod(-(-size // chunk) for size, chunk in pairs)
    if count > num_stored or math.prod(chunk_shape) > max(math.prod(array.shape), 1):
        raise ValueError(
            f"the array {name} of shape {tuple(array.shape)} cannot consist of {num_stored}"
            f" chunks of shape {tuple(chunk_shape)}"
        )


def _chunk_indices(array: Any) -> Iterator[str]:
    """Yields the indices of an array's chunks in the grid, as in their keys in the store."""
    pairs = zip(array.shape, array.storage.chunk_shape, strict=True)
    grid = (range(math.ceil(size / chunk)) for size, chunk in pairs)
    return (".".join(map(str, index)) or "0" for index in itertools.product(*grid))


def _stored_chunks(path: str) -> Iterator[tuple[str, tuple[str, int] | None]]:
    """Yields the keys of an OCDBT store, each with the file of its value and its end there.

    The second is None if the value is stored in the tree itself.
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
            value = None
            if "indirect_value" in entry:  # kind:folder:file:begin:length
                _, parent, name, begin, length = entry["indirect_value"].split(":")
                value = parent + name, int(begin) + int(length)
            yield prefix + entry["key"].decode(), value


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return -1
