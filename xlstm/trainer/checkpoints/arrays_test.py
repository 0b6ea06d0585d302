"""Tests of the arrays of checkpoints."""

import json
import os
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from xlstm.common_types import TrainState
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.arrays import (
    arrays_to_read,
    fill_missing,
    named_arrays,
    read_array_metadata,
    with_arrays,
)
from xlstm.trainer.checkpoints.streamed_arrays import StreamedArray, write_streamed_arrays

_SHAPES = {"stack": (4, 20, 20), "small": (3,)}
_EXPECTED = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in _SHAPES.items()}


@pytest.fixture
def path(tmp_path):
    """An array of four chunks, the second of which is zeros, and a small one of one chunk."""
    parts = (np.full((1, 20, 20), abs(i - 1), np.float32) for i in range(4))
    arrays = {
        "stack": StreamedArray(_SHAPES["stack"], 4, parts),
        "small": StreamedArray(_SHAPES["small"], 1, iter([np.zeros(3, np.float32)])),
    }
    write_streamed_arrays(str(tmp_path / "arrays"), arrays)
    return str(tmp_path / "arrays")


def _database(path, **options):
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}, **options}
    return tensorstore.KvStore.open(spec).result()


def _remove(path, key):
    _database(path).delete_range(tensorstore.KvStore.KeyRange(key, key + "\0")).result()


def test_what_is_there_whole(path):
    for expected in (None, _EXPECTED):
        found = read_array_metadata(path, expected)
        assert {name: x.shape for name, x in found.items()} == _SHAPES
        assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("key", ["stack/0.0.0", "stack/1.0.0", "stack/3.0.0"])
def test_a_missing_part_is_named_even_one_of_zeros(path, key):
    _remove(path, key)
    for expected in (None, _EXPECTED):
        with pytest.raises(ValueError, match="^1 of 4 chunks of the array stack are missing$"):
            read_array_metadata(path, expected)


def test_a_missing_array_is_named(path):
    _remove(path, "small/.zarray")
    with pytest.raises(ValueError, match="^the array small is missing$"):
        read_array_metadata(path, _EXPECTED)
    with pytest.raises(ValueError, match='cannot be opened .*"small/.zarray"'):
        read_array_metadata(path)
    with pytest.raises(ValueError, match="^the array third is missing$"):
        read_array_metadata(path, {"third": _EXPECTED["small"]})


@pytest.mark.parametrize("shape, dtype", [((4, 20, 10), np.float32), ((4, 20, 20), np.int32)])
def test_another_shape_or_type_is_named(path, shape, dtype):
    with pytest.raises(ValueError, match="the array stack is not listed with the shape"):
        read_array_metadata(path, {"stack": jax.ShapeDtypeStruct(shape, dtype)})


@pytest.mark.parametrize("size", [None, 0, 1599])
def test_a_file_that_is_cut_or_gone_is_named(path, size):
    folder = os.path.join(path, "ocdbt.process_0", "d")
    name = max(os.listdir(folder), key=lambda x: os.path.getsize(os.path.join(folder, x)))
    if size is None:
        os.remove(os.path.join(folder, name))
    else:
        os.truncate(os.path.join(folder, name), size)
    message = f"{name}, which holds a chunk of the array stack, is truncated or missing"
    with pytest.raises(ValueError, match=message):
        read_array_metadata(path)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA", "d"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_manifest_that_is_missing_or_other_bytes(path, name, is_there):
    damaged = os.path.join(path, name)
    shutil.move(damaged, f"{path}.{name}")
    if is_there:
        with open(damaged, "w") as file:
            file.write("{}")
    with pytest.raises((ValueError, OSError)):
        read_array_metadata(path)


def test_a_tree_of_several_levels(path):
    """As OCDBT creates for very many arrays."""
    database = _database(path)
    entries = {key: database[key] for key in database.list().result()}
    os.remove(os.path.join(path, "manifest.ocdbt"))
    shutil.rmtree(os.path.join(path, "d"))
    small_nodes = {"max_decoded_node_bytes": 200, "max_inline_value_bytes": 10}
    database = _database(path, config=small_nodes)
    with tensorstore.Transaction() as transaction:
        for key, value in entries.items():
            database.with_transaction(transaction)[key] = value
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
    assert tensorstore.ocdbt.dump(base).result()["versions"][-1]["root_height"] > 1
    assert read_array_metadata(path, _EXPECTED).keys() == _SHAPES.keys()
    _remove(path, "stack/2.0.0")
    with pytest.raises(ValueError, match="1 of 4 chunks of the array stack are missing"):
        read_array_metadata(path)


@pytest.mark.parametrize(
    "change", [{"shape": [10**12], "chunks": [1]}, {"chunks": [10**9]}, {"shape": [10**9]}]
)
def test_what_an_array_says_of_its_size_is_compared_with_its_parts(path, change):
    database = _database(path)
    layout = json.loads(database["small/.zarray"])
    database["small/.zarray"] = json.dumps(layout | change).encode()
    with pytest.raises(ValueError, match="^the array small of shape .* cannot consist of"):
        read_array_metadata(path)


_OPTIMIZER = optax.adam(1e-2)


def _state(optimizer=_OPTIMIZER, with_ema=False):
    params = {
        "blocks": {"w": nn.Partitioned(jnp.ones((2, 3)), names=(None, "tp"))},
        "bias": jnp.zeros(3),
    }
    return TrainState(
        step=jnp.array(4),
        apply_fn=None,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(unboxed(params)),
        rng=jax.random.PRNGKey(0),
        params_ema=jax.tree.map(lambda x: x + 1, params) if with_ema else None,
        grad_norm_mean=jnp.array(0.5),
        skipped_steps=jnp.array(1),
    )


_NAMES = {
    "params.blocks.w",
    "params.bias",
    "opt_state.0.count",
    "opt_state.0.mu.blocks.w",
    "opt_state.0.mu.bias",
    "opt_state.0.nu.blocks.w",
    "opt_state.0.nu.bias",
    "step",
    "rng",
    "grad_norm_mean",
    "skipped_steps",
}
_AVERAGE = {"params_ema.blocks.w", "params_ema.bias"}


@pytest.mark.parametrize("with_ema", [False, True])
def test_arrays_have_names_and_find_back(with_ema):
    state = _state(with_ema=with_ema)
    arrays = named_arrays(state)
    assert arrays.keys() == _NAMES | (_AVERAGE if with_ema else set())
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    found = with_arrays(state, {name: x + 7 for name, x in arrays.items()})
    expected = jax.tree.map(lambda x: x + 7, state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_average_may_be_missing():
    without, with_it = named_arrays(_state()), named_arrays(_state(with_ema=True))
    assert arrays_to_read(without, with_it).keys() == without.keys()
    assert arrays_to_read(with_it, with_it).keys() == with_it.keys()
    assert arrays_to_read(with_it, without).keys() == without.keys()
    for name in _NAMES:
        some = {other: x for other, x in without.items() if other != name}
        with pytest.raises(ValueError, match=f"{name} is .*, missing in this configuration"):
            arrays_to_read(some, without)
        with pytest.raises(ValueError, match=f"{name} is missing in the checkpoint, "):
            arrays_to_read(without, some)
    some = {name: x for name, x in with_it.items() if name != "params_ema.bias"}
    with pytest.raises(ValueError, match="params_ema.bias is missing in the checkpoint"):
        arrays_to_read(with_it, some)


def test_the_model_is_named_before_the_optimizer():
    wanted, saved = named_arrays(_state(optax.sgd(1e-2))), named_arrays(_state())
    with pytest.raises(ValueError, match="^it has another optimizer: opt_state.0.count is a sc"):
        arrays_to_read(wanted, saved)
    wanted["params.bias"] = jnp.zeros(5)
    message = r"^params.bias is of shape \(3,\) in the checkpoint, of shape \(5,\) in this config"
    with pytest.raises(ValueError, match=message):
        arrays_to_read(wanted, saved)


def test_an_average_that_is_missing_is_a_copy():
    wanted, read = named_arrays(_state(with_ema=True)), named_arrays(_state())
    filled = fill_missing(wanted, read)
    assert filled.keys() == wanted.keys()
    np.testing.assert_array_equal(filled["params_ema.blocks.w"], read["params.blocks.w"])
    read["params.blocks.w"].delete()
    assert np.all(np.array(filled["params_ema.blocks.w"]) == 1)
    found = fill_missing(wanted, wanted)
    assert all(found[name] is wanted[name] for name in wanted)
