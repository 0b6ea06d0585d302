from xlstm.dataset.config import DataConfig
from xlstm.dataset.data import open_data
from xlstm.dataset.testing import assert_equal_batches, config_for, write_store


def _open(store, **fields):
    return open_data(config_for(store, context_length=4, batch_size=2, **fields), "")


def test_a_corpus_is_known_by_its_text_not_its_place(tmp_path):
    stores = [
        write_store(tmp_path / name, texts)
        for name, texts in {"a": ["x" * 9, "y"], "b": ["x" * 9, "y"], "c": ["x" * 9, "z"]}.items()
    ]
    one, same, other = (_open(store, validation_fraction=0.0).checksums for store in stores)
    assert one == same != other


def test_all_stores_are_known_to_who_guards_them(tmp_path):
    one, two = (write_store(tmp_path / name, ["x" * 99] * 9) for name in ("one", "two"))
    config = DataConfig(
        stores=("stdlib", one.path), validation_fraction=0.2, validation_stores=(f"b={two.path}",)
    )
    data = open_data(config, str(tmp_path / "stdlib"))
    assert [store.path for store in data.stores] == [str(tmp_path / "stdlib"), one.path]
    held_out, named = data.validation_sets()
    assert held_out.stores == data.stores
    assert [store.path for store in named.stores] == [two.path]


def test_a_task_takes_the_place_of_the_stores():
    config = DataConfig(task="parity", context_length=64, batch_size=4)
    data = open_data(config, "/nowhere")
    assert data.checksums == ["task parity"] and data.validation_sets() == []
    assert not data.stores
    batches = data.train_batches()
    again = open_data(config, "/nowhere").train_batches(start_step=1)
    next(batches)
    assert_equal_batches([next(batches)], [next(again)])
