"""Safetensors files of a model in the Hugging Face format, read and written tensor by tensor."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xlstm.common_types import DTYPES
from xlstm.files import find_file, inner_path, naming_file, read_json
from xlstm.huggingface.layout import HFTensor
from xlstm.trainer.checkpoints.storage import as_os_error

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_READABLE = ("F32", "BF16", "F16")
_MOST_LISTED = 20


def open_tensors(folder: str) -> dict[str, safe_open]:
    """Opens the safetensors files of a model.

    Args:
        folder: The model's folder.

    Returns:
        The open file of each tensor, by the tensor's name.

    Raises:
        ValueError: If a file is missing, damaged or outside of the folder, or the index does not
            match the files.
    """
    weight_map = _weight_map(folder)
    opened = {name: _open(inner_path(folder, name)) for name in sorted(set(weight_map.values()))}
    held = {(tensor, name) for name, file in opened.items() for tensor in file.keys()}
    disputed = held ^ set(weight_map.items())
    if disputed:
        names = {f"{tensor} in {name}" for tensor, name in disputed}
        raise ValueError(f"{folder}: the index and the files disagree about {_listed(names)}")
    return {name: opened[file] for name, file in weight_map.items()}


def count_elements(tensors: Mapping[str, safe_open]) -> int:
    """Counts the elements of all tensors, from the shapes in the files' headers."""
    slices = (file.get_slice(name) for name, file in tensors.items())
    return sum(math.prod(entry.get_shape()) for entry in slices)


def check_tensors(
    folder: str, expected: Iterable[HFTensor], tensors: Mapping[str, safe_open]
) -> None:
    """Checks the names, shapes and types of a model's tensors.

    Args:
        folder: The model's folder.
        expected: The tensors that the model must have.
        tensors: Result of `open_tensors`.

    Raises:
        ValueError: If tensors are missing or unexpected, or have other shapes or types.
    """
    names = {tensor.name for tensor in expected}
    if names != tensors.keys():
        raise ValueError(
            f"{folder}: the tensors do not match config.json (missing:"
            f" {_listed(names - tensors.keys())}; unexpected: {_listed(tensors.keys() - names)})"
        )
    wrong = []
    for tensor in expected:
        entry = tensors[tensor.name].get_slice(tensor.name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != tensor.shape:
            wrong.append(f"{tensor.name} has the shape {shape}, expected {tensor.shape}")
        if dtype not in _READABLE:
            wrong.append(f"{tensor.name} has the type {dtype}, expected {' or '.join(_READABLE)}")
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}")


def _weight_map(folder: str) -> dict[str, str]:
    """Returns the file name of each tensor: from the index or, without one, the only file."""
    path = find_file(folder, _INDEX_FILE)
    if path is None:
        single = find_file(folder, _SINGLE_FILE)
        if single is None:
            raise ValueError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
        return dict.fromkeys(_open(single).keys(), _SINGLE_FILE)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{path} has no weight_map: expected an object that maps tensors to files")
    missing = [name for name in set(weight_map.values()) if find_file(folder, name) is None]
    if missing:
        raise ValueError(f"{path} names files that are missing: {_listed(missing)}")
    return weight_map


def _open(path: str) -> safe_open:
    try:
        # A memory-mapped file would stay in memory once read.
        return safe_open(path, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _listed(names: Iterable[str]) -> str:
    first, *more = sorted(names) or ["none"]
    listed = ", ".join([first, *more[: _MOST_LISTED - 1]])
    left_out = len(more) - _MOST_LISTED + 1
    return f"{listed} and {left_out:,} more" if left_out > 0 else listed


def write_tensors(
    folder: str,
    tensors: Sequence[HFTensor],
    read: Callable[[HFTensor], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> int:
    """Writes the tensors of a model to one or several files, with one file in memory at a time.

    Args:
        folder: The folder for the files.
        tensors: The tensors.
        read: Returns one of them, float32.
        dtype: Type to write them as, `float32` or `bfloat16`.
        max_shard_bytes: Largest total size of the tensors in a file; a larger tensor gets its own.

    Returns:
        The number of files.

    Raises:
        OSError: If a file cannot be written.
    """
    kind = np.dtype(DTYPES[dtype])
    shards = _shards(tensors, kind.itemsize, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else _SINGLE_FILE
        arrays = {tensor.name: read(tensor).astype(kind, copy=False) for tensor in shard}
        _save(os.path.join(folder, name), arrays)
        del arrays  # Frees the memory before the next file is read.
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        total_size = sum(tensor.size for tensor in tensors) * kind.itemsize
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(os.path.join(folder, _INDEX_FILE), index)
    return len(shards)


def _save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    with as_os_error(f"{path} cannot be written"):
        with open(path, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(arrays, path, metadata={"format": "pt"})
        os.chmod(path, mode)  # The library makes its files private.


def _shards(
    tensors: Iterable[HFTensor], itemsize: int, max_shard_bytes: int
) -> list[list[HFTensor]]:
    shards, room = [], 0
    for tensor in tensors:
        size = tensor.size * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON object, formatted as Hugging Face models are."""
    with naming_file(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
