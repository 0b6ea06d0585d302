"""Files of tensors in the public layout: found, checked, read and written, tensor by tensor."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xlstm.common_types import DTYPES
from xlstm.models.xlstm_parallel.hf_layout import HFTensor
from xlstm.trainer.base.checkpointing import reported

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_READABLE = ("F32", "BF16", "F16")


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError if the file holds no such thing."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def open_tensors(folder: str, wanted: Sequence[HFTensor]) -> dict[str, safe_open]:
    """Opens the files of a model, and checks everything but the numbers.

    Args:
        folder: The folder of the files.
        wanted: The tensors that the model must have.

    Returns:
        For each tensor's name, the file that it is in.

    Raises:
        ValueError: If a file is missing or damaged, or the tensors are others than those wanted;
            they are all named.
    """
    weight_map = _weight_map(folder)
    opened = {name: _open(os.path.join(folder, name)) for name in sorted(set(weight_map.values()))}
    held = {(tensor, name) for name, file in opened.items() for tensor in file.keys()}
    disputed = held ^ set(weight_map.items())
    if disputed:
        names = {f"{tensor} in {name}" for tensor, name in disputed}
        raise ValueError(f"{folder}: the index and the files disagree about {_listed(names)}")
    names = {tensor.name for tensor in wanted}
    if names != weight_map.keys():
        raise ValueError(
            f"{folder}: the tensors are not those of the model in config.json (missing:"
            f" {_listed(names - weight_map.keys())}; unexpected:"
            f" {_listed(weight_map.keys() - names)})"
        )
    tensors = {name: opened[file] for name, file in weight_map.items()}
    _check_tensors(folder, wanted, tensors)
    return tensors


def _weight_map(folder: str) -> dict[str, str]:
    """The file of each tensor that the index lists; without an index there is one file."""
    path = os.path.join(folder, _INDEX_FILE)
    if not os.path.exists(path):
        if not os.path.exists(os.path.join(folder, _SINGLE_FILE)):
            raise ValueError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
        return dict.fromkeys(_open(os.path.join(folder, _SINGLE_FILE)).keys(), _SINGLE_FILE)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files")
    files = set(weight_map.values())
    missing = [name for name in files if not os.path.exists(os.path.join(folder, name))]
    if missing:
        raise ValueError(f"{path} names files that are missing: {_listed(missing)}")
    return weight_map


def _open(path: str) -> safe_open:
    try:
        # Mapped into memory, all of a file that was read would stay there.
        return safe_open(path, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _check_tensors(
    folder: str, wanted: Iterable[HFTensor], tensors: Mapping[str, safe_open]
) -> None:
    wrong = []
    for tensor in wanted:
        entry = tensors[tensor.name].get_slice(tensor.name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != tensor.shape:
            wrong.append(f"{tensor.name} has the shape {shape}, not {tensor.shape}")
        if dtype not in _READABLE:
            wrong.append(f"{tensor.name} is of the type {dtype}, not {' or '.join(_READABLE)}")
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def write_tensors(
    folder: str,
    tensors: Sequence[HFTensor],
    read: Callable[[HFTensor], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> int:
    """Writes the tensors of a model, into several files if they are large, one in memory at a time.

    Args:
        folder: The folder for the files.
        tensors: The tensors.
        read: Returns one of them, float32.
        dtype: As what they are written, `float32` or `bfloat16`.
        max_shard_bytes: Largest size of a file's tensors together; a single larger one has its own.

    Returns:
        The number of files.

    Raises:
        OSError: If something cannot be written.
    """
    kind = np.dtype(DTYPES[dtype])
    shards = _shards(tensors, kind.itemsize, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else _SINGLE_FILE
        arrays = {tensor.name: read(tensor).astype(kind, copy=False) for tensor in shard}
        _save(os.path.join(folder, name), arrays)
        del arrays  # Before those of the next one are made.
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        total_size = sum(tensor.size for tensor in tensors) * kind.itemsize
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(os.path.join(folder, _INDEX_FILE), index)
    return len(shards)


def _save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    with reported(f"{path} cannot be written"):
        with open(path, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(arrays, path, metadata={"format": "pt"})
        os.chmod(path, mode)  # The library keeps its files from all other users.


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
    """Writes a JSON object in the way of public models."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
