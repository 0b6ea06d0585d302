import json
import os
import stat
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xlstm.files import read_json
from xlstm.huggingface.layout import HFTensor
from xlstm.huggingface.safetensors_files import (
    check_tensors,
    count_elements,
    open_tensors,
    write_json,
    write_tensors,
)

_SHAPES = {"a": (2, 3), "b": (4,), "c": (5, 2)}
_EXPECTED = [HFTensor(name, shape, name, None, False) for name, shape in _SHAPES.items()]
_ARRAYS = {
    name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for name, shape in _SHAPES.items()
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _write(folder, *, max_shard_bytes=1000, dtype="float32"):
    read = lambda tensor: _ARRAYS[tensor.name]  # noqa: E731
    options = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    return write_tensors(str(folder), _EXPECTED, read, **options)


def _read(folder):
    tensors = open_tensors(folder)
    check_tensors(folder, _EXPECTED, tensors)
    return {name: file.get_tensor(name) for name, file in tensors.items()}


@pytest.mark.parametrize("max_shard_bytes, files", [(1000, 1), (80, 1), (40, 2), (1, 3)])
def test_what_is_written_is_read(tmp_path, max_shard_bytes, files):
    assert _write(tmp_path, max_shard_bytes=max_shard_bytes) == files
    names = {name for name in os.listdir(tmp_path) if name.endswith(".safetensors")}
    if files == 1:
        assert os.listdir(tmp_path) == [_SINGLE]
    else:
        assert names == {f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)}
        index = read_json(str(tmp_path / _INDEX))
        assert index["metadata"] == {"total_size": 80}
        assert index["weight_map"].keys() == _SHAPES.keys()
    found = _read(str(tmp_path))
    assert found.keys() == _SHAPES.keys()
    for name, array in found.items():
        assert array.tobytes() == _ARRAYS[name].tobytes()
    # The files have the default permissions.
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in [*names, "other"]}
    assert len(modes) == 1


def test_a_file_is_in_memory_at_a_time(tmp_path):
    read = []

    def make(tensor):
        assert sum(array() is not None for array in read) <= 1
        array = _ARRAYS[tensor.name].copy()
        read.append(weakref.ref(array))
        return array

    options = {"dtype": "float32", "max_shard_bytes": 24 + 16}
    assert write_tensors(str(tmp_path), _EXPECTED, make, **options) == 2
    assert len(read) == 3


def test_other_types(tmp_path):
    _write(tmp_path, dtype="bfloat16")
    assert {x.dtype for x in load_file(tmp_path / _SINGLE).values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    half = {name: array.astype(np.float16) for name, array in _ARRAYS.items()}
    save_file(half, tmp_path / _SINGLE)
    np.testing.assert_array_equal(_read(str(tmp_path))["c"], _ARRAYS["c"])


def _without(*names, **more):
    return {name: x for name, x in (_ARRAYS | more).items() if name not in names}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (_without("a", "c"), "missing: a, c; unexpected: none"),
        (_without(x=_ARRAYS["a"], y=_ARRAYS["b"]), "missing: none; unexpected: x, y"),
        (_without("b", x=_ARRAYS["a"]), "missing: b; unexpected: x"),
        (_without(a=_ARRAYS["a"].T.copy()), r"a has the shape \(3, 2\), expected \(2, 3\)$"),
        (
            _without(a=_ARRAYS["c"], c=_ARRAYS["a"]),
            r"a has the shape \(5, 2\), expected \(2, 3\); c has .*\(2, 3\), expected \(5, 2\)",
        ),
        (_without(b=np.arange(4)), "b has the type I64, expected F32 or BF16 or F16"),
    ],
    ids=str,
)
def test_other_tensors(tmp_path, arrays, message):
    save_file(arrays, tmp_path / _SINGLE)
    tensors = open_tensors(str(tmp_path))
    assert count_elements(tensors) == sum(array.size for array in arrays.values())
    with pytest.raises(ValueError, match=message):
        check_tensors(str(tmp_path), _EXPECTED, tensors)


@pytest.mark.parametrize("size", [0, 7, 50, -1])
def test_a_truncated_file(tmp_path, size):
    _write(tmp_path)
    content = (tmp_path / _SINGLE).read_bytes()
    (tmp_path / _SINGLE).write_bytes(content[:size])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        open_tensors(str(tmp_path))


def test_a_file_of_several_is_missing_or_truncated(tmp_path):
    _write(tmp_path, max_shard_bytes=40)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is not a whole"):
        open_tensors(str(tmp_path))
    second.unlink()
    with pytest.raises(ValueError, match="files that are missing: model-00002-of-00002"):
        open_tensors(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: {}, "has no weight_map"),
        (lambda index: {"weight_map": {"a": 3}}, "has no weight_map"),
        (lambda index: [], "holds no JSON object"),
        (lambda index: index["weight_map"].pop("a") and index, "disagree about a in model-00001"),
        (
            lambda index: {"weight_map": index["weight_map"] | {"x": index["weight_map"]["a"]}},
            "disagree about x in model-00001",
        ),
    ],
)
def test_another_index(tmp_path, change, message):
    _write(tmp_path, max_shard_bytes=40)
    index = change(read_json(str(tmp_path / _INDEX)))
    (tmp_path / _INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        open_tensors(str(tmp_path))


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match=f"has neither {_SINGLE} nor {_INDEX}"):
        open_tensors(str(tmp_path))


def test_what_is_written_is_json(tmp_path):
    path = str(tmp_path / "x.json")
    write_json(path, {"b": "ü", "a": [1]})
    assert read_json(path) == {"a": [1], "b": "ü"}


@pytest.mark.parametrize(
    "name, message",
    [
        ("../model.safetensors", "not a plain name"),
        ("", "not a plain name"),
        ("..", "not a plain name"),
        ("a\0b", "not a plain name"),
        ("link", "leads out of"),
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name, message):
    _write(tmp_path)  # A file outside of the folder, with the right tensors.
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / _SINGLE)
    outside = str(tmp_path / _SINGLE)
    for written in (name, outside):
        index = {"weight_map": dict.fromkeys(_SHAPES, written)}
        (folder / _INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match="not a plain name" if written == outside else message):
            open_tensors(str(folder))


def test_a_link_instead_of_the_only_file(tmp_path):
    _write(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / _SINGLE).symlink_to("../model.safetensors")
    with pytest.raises(ValueError, match="leads out of"):
        open_tensors(str(folder))


def test_many_names_are_a_few_in_a_message(tmp_path):
    save_file({f"x{i:03}": np.zeros(1) for i in range(100)}, tmp_path / _SINGLE)
    with pytest.raises(ValueError, match="unexpected: x000, x001, .*, x019 and 80 more"):
        check_tensors(str(tmp_path), _EXPECTED, open_tensors(str(tmp_path)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="model.safetensors cannot be written: .*Not a directory"):
        _write(tmp_path / "file")
