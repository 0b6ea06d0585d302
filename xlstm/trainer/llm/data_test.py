"""Tests of batches on the mesh."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.data import open_data
from xlstm.dataset.testing import write_letter_store, write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.distributed.mesh import MESH_AXES, MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import (
    check_vocabulary,
    create_run_mesh,
    dump_batch,
    global_batches,
    process_shard,
)


@pytest.mark.parametrize(
    "batch_size, num_minibatches, sizes",
    [
        (16, 2, {"dp": 8}),
        (8, 1, {"dp": 2, "fsdp": 4}),
        (3, 1, {"dp": 1, "tp": 4, "pp": 2, "num_microbatches": 3}),
        (16, 2, {"dp": 2, "pp": 4}),
    ],
    ids=str,
)
def test_the_batch_divides(batch_size, num_minibatches, sizes):
    config = RunConfig(
        mesh=MeshConfig(**sizes),
        data=DataConfig(batch_size=batch_size),
        trainer=TrainerConfig(num_minibatches=num_minibatches),
    )
    mesh = create_run_mesh(config)
    assert {axis: mesh.shape[axis] for axis in sizes if axis in mesh.shape} == {
        axis: size for axis, size in sizes.items() if axis in mesh.shape
    }


@pytest.mark.parametrize(
    "batch_size, num_minibatches, sizes, shards, multiple",
    [
        (12, 1, {"dp": 8}, 8, 8),
        (12, 1, {"dp": 4, "fsdp": 2}, 8, 8),
        (8, 2, {"dp": 8}, 8, 16),
        (6, 4, {"dp": 2, "tp": 4}, 2, 8),
        (8, 2, {"dp": 2, "pp": 4}, 2, 16),
        (8, 1, {"dp": 4, "pp": 2, "num_microbatches": 3}, 4, 12),
    ],
    ids=str,
)
def test_a_batch_that_does_not_divide(batch_size, num_minibatches, sizes, shards, multiple):
    config = RunConfig(
        mesh=MeshConfig(**sizes),
        data=DataConfig(batch_size=batch_size),
        trainer=TrainerConfig(num_minibatches=num_minibatches),
    )
    with pytest.raises(ValueError) as caught:
        create_run_mesh(config)
    message = str(caught.value)
    assert f"data.batch_size={batch_size} does not divide into {shards} shards" in message
    assert message.endswith(f"expected a multiple of {multiple}")
    assert ("micro-batches" in message) == ("pp" in sizes)


def test_every_batch_size_of_a_ramp_divides():
    data = DataConfig(batch_size=16, ramp_batch_sizes=(8, 12), ramp_steps=(1, 1))
    with pytest.raises(ValueError, match="data.ramp_batch_sizes=12 does not divide into 8 shards"):
        create_run_mesh(RunConfig(data=data))
    fitting = dataclasses.replace(data, ramp_batch_sizes=(8, 16))
    assert create_run_mesh(RunConfig(data=fitting)).size == 8


@pytest.mark.parametrize(
    "sizes, model, message",
    [
        (
            {"pp": 8},
            {},
            "model.num_blocks=4 does not divide over mesh.pp=8: expected a multiple of 8",
        ),
        ({"tp": 8}, {}, "model.num_heads=4 does not divide over mesh.tp=8"),
        (
            {"cp": 4, "tp": 2},
            {"ratio": "[1:1]"},
            "the number of heads in sLSTM blocks, model.num_heads=4 does not divide over"
            " mesh.cp=4 x mesh.tp=2: expected a multiple of 8",
        ),
        ({"tp": 4}, {"ffn_round_up_to_multiple_of": 1}, "model.ffn_dim=341 does not divide"),
        (
            {"pp": 2, "tp": 4},
            {"vocab_size": 260},
            "model.vocab_size=260 does not divide over mesh.pp=2 x mesh.tp=4: expected a multiple",
        ),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_the_mesh(sizes, model, message):
    config = RunConfig(mesh=MeshConfig(**sizes), model=ModelConfig(**model))
    with pytest.raises(ValueError, match=message):
        create_run_mesh(config)


@pytest.mark.parametrize(
    "sizes, block, context_length, message",
    [
        (
            {"cp": 2, "tp": 4},
            "xlstm_7b",
            252,
            "data.context_length=252 does not divide over mesh.pp=1 x mesh.cp=2 x mesh.tp=4:"
            " expected a multiple of 8",
        ),
        (
            {"cp": 8},
            "xlstm_2024",
            16,
            "data.context_length=16 over mesh.cp=8 leaves parts of 2 tokens, but the convolution of"
            " width 4 (model.conv_width) needs 3: expected a data.context_length of at least 24, or"
            " a mesh.cp of at most 4",
        ),
        (
            {"cp": 4, "tp": 2},
            "xlstm_2024",
            8,
            "data.context_length=8 over mesh.cp=4 leaves parts of 2 tokens, but the convolution of"
            " width 4 (model.conv_width) needs 3: expected a data.context_length of at least 16, or"
            " a mesh.cp of at most 2",
        ),
    ],
    ids=str,
)
def test_a_context_that_does_not_fit_the_mesh(sizes, block, context_length, message):
    config = RunConfig(
        model=ModelConfig(block=block),
        mesh=MeshConfig(**sizes),
        data=DataConfig(context_length=context_length),
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        create_run_mesh(config)


def test_parts_may_be_short_without_a_convolution():
    config = RunConfig(mesh=MeshConfig(cp=8), data=DataConfig(context_length=16))
    assert create_run_mesh(config).shape["cp"] == 8


def test_one_backend_alone_shares_the_tokens_of_a_row():
    config = RunConfig(backend=BackendConfig(name="recurrent"), mesh=MeshConfig(cp=2))
    message = "mesh.cp=2 does not work with backend.name=recurrent: expected backend.name=fwbw, or"
    with pytest.raises(ValueError, match=f"{message} mesh.cp=1$"):
        create_run_mesh(config)
    one_part = dataclasses.replace(config, mesh=MeshConfig(cp=1))
    assert create_run_mesh(one_part).size == 8


class _Device:
    """A device of any process, as far as a mesh looks at it."""

    def __init__(self, index, devices_per_process):
        self.id, self.process_index = index, index // devices_per_process


@pytest.mark.parametrize(
    "shape, devices_per_process, process, shard",
    [
        ((4, 2, 1, 1, 1), 2, 1, (1, 4)),  # A process has two rows of its own.
        ((2, 1, 1, 1, 4), 2, 1, (0, 2)),  # Two processes share a `tp` group, and so the rows.
        ((2, 1, 1, 1, 4), 2, 2, (1, 2)),
        ((2, 1, 1, 4, 1), 2, 1, (0, 2)),  # Also if they share the tokens of each row.
        ((1, 1, 2, 1, 4), 2, 3, (0, 1)),
        ((8, 1, 1, 1, 1), 8, 0, (0, 1)),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(
    monkeypatch, shape, devices_per_process, process, shard
):
    devices = np.array([_Device(i, devices_per_process) for i in range(8)]).reshape(shape)
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, shape, strict=True)))
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert tuple(process_shard(mesh).values()) == shard


def test_rows_that_are_no_equal_piece_of_the_batch():
    devices = np.array([_Device(i, 3) for i in range(6)]).reshape(3, 1, 1, 1, 2)
    mesh = types.SimpleNamespace(
        devices=devices, shape=dict(zip(MESH_AXES, devices.shape, strict=True))
    )
    with pytest.raises(ValueError, match=r"process 0 have the positions \[0, 1\] of 3 along"):
        process_shard(mesh)


def test_the_vocabulary_must_hold_the_store_s(tmp_path):
    byte_store = write_store(tmp_path / "bytes", ["abc"])
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    store = write_store(tmp_path / "store", ["abc"], tokenizer)
    size = store.meta.vocab_size
    fits = RunConfig(model=ModelConfig(vocab_size=max(size, byte_store.meta.vocab_size)))
    check_vocabulary(fits, byte_store.load_tokenizer())
    check_vocabulary(fits, store.load_tokenizer())
    small = dataclasses.replace(fits, model=ModelConfig(vocab_size=size - 1))
    with pytest.raises(ValueError) as caught:
        check_vocabulary(small, store.load_tokenizer())
    message = str(caught.value)
    assert str(size) in message and f"model.vocab_size={size - 1}" in message


def test_stages_repeat_the_pattern_of_a_mixed_stack():
    model = ModelConfig(num_blocks=8, ratio="[3:1]", num_heads=4)
    create_run_mesh(RunConfig(model=model, mesh=MeshConfig(dp=4, pp=2)))
    with pytest.raises(ValueError) as caught:
        create_run_mesh(RunConfig(model=model, mesh=MeshConfig(dp=2, pp=4)))
    assert "mesh.pp=4 stages cannot hold the same blocks: the pattern of 4" in str(caught.value)
    assert "repeats 2 times (model.num_blocks=8), which is not a multiple of 4" in str(caught.value)


def test_rows_are_placed_on_the_mesh():
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    local = [
        Batch(inputs=rows + i, targets=rows, targets_mask=rows > 5, reset=rows > 7)
        for i in range(2)
    ]
    batches = list(global_batches(local, create_mesh(MeshConfig(dp=2, fsdp=2, tp=2))))
    assert len(batches) == 2
    for batch, given in zip(batches, local, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, given)
        assert batch.inputs.sharding.shard_shape((16, 3)) == (4, 3)
        assert batch.targets_mask.dtype == bool


def test_batches_are_taken_one_by_one():
    def endless():
        while True:
            yield np.zeros((8, 2), np.int32)

    batches = global_batches(endless(), create_mesh(MeshConfig()))
    assert next(batches).shape == (8, 2)
    assert next(batches).shape == (8, 2)


_FIRST = 1  # Document i of the store consists of the byte i + 1.


@pytest.fixture
def store(tmp_path):
    return write_letter_store(tmp_path / "store", first=_FIRST)


def _config(**fields):
    return DataConfig(**{"context_length": 16, "validation_fraction": 0.0} | fields)


# The first two batches have 2 rows, the others 4.
@pytest.mark.parametrize("step, num_rows", [(1, 2), (3, 4)])
def test_a_step_s_batch_is_kept_with_its_documents(tmp_path, store, step, num_rows):
    config = _config(stores=(store.path,), batch_size=4, ramp_batch_sizes=(2,), ramp_steps=(2,))
    directory = tmp_path / "run" / "bad"
    data = open_data(config, "")
    text = dump_batch(data, str(directory), step)

    trained_on = list(zip(range(step), data.train_batches(), strict=False))[-1][1]
    with np.load(directory / f"step_{step}.npz") as batch:
        assert sorted(batch) == ["inputs", "reset", "targets", "targets_mask"]
        for name in batch:
            np.testing.assert_array_equal(batch[name], getattr(trained_on, name))

    origins = json.loads((directory / f"step_{step}.json").read_text())
    assert len(origins) == num_rows
    named = []
    for origin, row in zip(origins, trained_on.targets, strict=True):
        first, last = origin["first_document"], origin["last_document"]
        assert origin["store"] == store.path
        assert set(row.tolist()) - {0} <= {_FIRST + i for i in range(first, last + 1)}
        named.append(str(first) if first == last else f"{first}-{last}")
    assert text == (
        f"its batch (documents {', '.join(named)} of {store.path}) is in"
        f" {directory}/step_{step}.npz"
    )


def test_documents_are_named_store_by_store(tmp_path, store):
    other = write_letter_store(tmp_path / "other", seed=1)
    config = _config(batch_size=16, stores=(store.path, other.path))
    text = dump_batch(open_data(config, ""), str(tmp_path / "bad"), 1)
    assert text.count(f" of {store.path}") == text.count(f" of {other.path}") == 1
    assert text.count("documents ") == 2


def test_rows_of_a_task_are_named_by_number(tmp_path):
    config = _config(task="parity", context_length=64, batch_size=2)
    text = dump_batch(open_data(config, ""), str(tmp_path / "bad"), 2)
    assert text.startswith("its batch (documents 2, 3 of task parity) is in ")
