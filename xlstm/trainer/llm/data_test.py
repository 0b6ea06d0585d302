import dataclasses

import jax
import numpy as np
import pytest

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.trainer import TrainerConfig
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import (
    check_batch_size,
    check_vocabulary,
    corpus_checksums,
    create_run_mesh,
    global_batches,
)


@pytest.mark.parametrize(
    "batch_size, num_minibatches, sizes, shares",
    [
        (16, 2, {"dp": 8}, None),
        (8, 1, {"dp": 2, "fsdp": 4}, None),
        (3, 1, {"tp": 8}, None),
        (12, 1, {"dp": 8}, 8),
        (12, 1, {"dp": 4, "fsdp": 2}, 8),
        (8, 2, {"dp": 8}, 8),
        (6, 4, {"dp": 2, "tp": 4}, 2),
    ],
    ids=str,
)
def test_the_batch_must_divide(batch_size, num_minibatches, sizes, shares):
    config = RunConfig(
        data=DataConfig(batch_size=batch_size),
        trainer=TrainerConfig(num_minibatches=num_minibatches),
    )
    mesh = create_mesh(MeshConfig(**sizes))
    if shares is None:
        check_batch_size(config, mesh)
        return
    with pytest.raises(ValueError) as caught:
        check_batch_size(config, mesh)
    assert f"data.batch_size={batch_size} does not divide into {shares} shares" in str(caught.value)
    assert f"a multiple of {shares * num_minibatches} would" in str(caught.value)


def test_the_vocabulary_must_hold_the_store_s(tmp_path):
    byte_store = write_store(tmp_path / "bytes", ["abc"])
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    store = write_store(tmp_path / "store", ["abc"], tokenizer)
    size = store.meta.vocab_size
    fits = RunConfig(model=ModelConfig(vocab_size=max(size, byte_store.meta.vocab_size)))
    check_vocabulary(fits, [byte_store, store])
    small = dataclasses.replace(fits, model=ModelConfig(vocab_size=size - 1))
    with pytest.raises(ValueError) as caught:
        check_vocabulary(small, [store])
    message = str(caught.value)
    assert str(tmp_path / "store") in message
    assert str(size) in message and f"model.vocab_size={size - 1}" in message


def test_a_corpus_is_known_by_its_text_not_its_place(tmp_path):
    stores = [
        write_store(tmp_path / name, texts)
        for name, texts in {"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "z"]}.items()
    ]
    one, same, other = corpus_checksums(stores)
    assert one == same != other


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


@pytest.mark.parametrize("axis", ["fsdp", "pp", "tp"])
def test_an_axis_that_training_does_not_support_is_refused(axis):
    config = dataclasses.replace(RunConfig(), mesh=MeshConfig(**{axis: 2}))
    with pytest.raises(ValueError, match=f"mesh.{axis}=2: training does not support this axis"):
        create_run_mesh(config)
