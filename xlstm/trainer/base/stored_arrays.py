"""What is stored of arrays in a folder, found out without reading them.

TensorStore keeps the parts of all arrays in one database: a manifest leads to the nodes of a tree,
whose entries hold a part or say in which file it lies. Every process writes a database of its own,
and the first one puts them together.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tensorstore

from xlstm.json_file import read_json
from xlstm.trainer.base.storage_path import literal_path_handler


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
