import json

import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.data import open_data
from xlstm.dataset.testing import write_letter_store
from xlstm.trainer.llm.bad_batches import dump_batch

_FIRST = 1  # Document i of the store consists of the byte i + 1.


@pytest.fixture
def store(tmp_path):
    return write_letter_store(tmp_path / "store", first=_FIRST)


def _config(**fields):
    return DataConfig(**{"context_length": 16, "validation_fraction": 0.0} | fields)


# Two batches of 2 rows come before those of 4.
@pytest.mark.parametrize("step, num_rows", [(1, 2), (3, 4)])
def test_a_step_s_batch_is_kept_with_its_documents(tmp_path, store, step, num_rows):
    config = _config(stores=(store.path,), batch_size=4, ramp_batch_sizes=(2,), ramp_steps=(2,))
    directory = tmp_path / "run" / "bad"
    data = open_data(config, "")
    text = dump_batch(data, str(directory), step)

    trained_on = list(zip(range(step), data.train_batches(), strict=False))[-1][1]
    with np.load(directory / f"step_{step}.npz") as batch:
        assert sorted(batch) == sorted(vars(trained_on))
        for name, rows in vars(trained_on).items():
            np.testing.assert_array_equal(batch[name], rows)

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
