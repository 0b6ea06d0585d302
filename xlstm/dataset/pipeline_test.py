import itertools

import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.pipeline import open_stores, train_batches, validation_batches
from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.dataset.windows import Windows, split_documents

FIELDS = ("inputs", "targets", "targets_mask", "reset")


def make_store(path, first=1, documents=60, seed=0):
    """Documents of random length; the text of each is one letter that no other has."""
    lengths = np.random.default_rng(seed).integers(5, 40, documents)
    return write_store(path, [chr(first + i) * int(n) for i, n in enumerate(lengths)])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def config_for(*stores, **fields):
    defaults = {"context_length": 16, "batch_size": 8, "validation_fraction": 0.2}
    paths = tuple(store.path for store in stores)
    return DataConfig(stores=paths, **{**defaults, **fields})


def take(count, batches):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def letters(batches):
    """The distinct tokens that are seen, markers apart."""
    seen = set()
    for batch in batches:
        seen |= set(batch.inputs[:, 1:][batch.targets_mask[:, :-1]].tolist())
        seen |= set(batch.targets[batch.targets_mask].tolist())
    return seen - {0}


def test_fields_of_a_batch(store):
    (batch,) = take(1, train_batches(config_for(store), [store]))
    for field in FIELDS:
        assert getattr(batch, field).shape == (8, 16)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.targets_mask.dtype == batch.reset.dtype == bool
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.inputs[:, 1:])
    np.testing.assert_array_equal(batch.reset, batch.inputs == store.meta.eod_id)
    assert batch.targets_mask.all() and batch.reset.any()
    # Where no document begins, the text goes on with the same letter.
    goes_on = (batch.inputs != 0) & (batch.targets != 0)
    np.testing.assert_array_equal(batch.inputs[goes_on], batch.targets[goes_on])


def test_the_seed_decides(store):
    config = config_for(store)
    first = take(10, train_batches(config, [store]))
    assert_equal(first, take(10, train_batches(config, [store])))
    other = take(10, train_batches(config_for(store, seed=1), [store]))
    assert any(np.any(a.inputs != b.inputs) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("start", [1, 7, 100])
def test_starting_later_is_skipping(store, start):
    config = config_for(store)
    skipped = take(start + 5, train_batches(config, [store]))[start:]
    assert_equal(take(5, train_batches(config, [store], start_step=start)), skipped)


def test_any_step_is_at_hand(store):
    far = 10**12
    config = config_for(store)
    (batch,) = take(1, train_batches(config, [store], start_step=far))
    before = take(2, train_batches(config, [store], start_step=far - 1))
    assert_equal([batch], before[1:])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_each_batch(store, count):
    config = config_for(store)
    for make, options in (
        (train_batches, {"start_step": 3}),
        (validation_batches, {}),
    ):
        whole = take(4, make(config, [store], **options))
        parts = [
            take(4, make(config, [store], shard_index=i, shard_count=count, **options))
            for i in range(count)
        ]
        for step, batch in enumerate(whole):
            for field in FIELDS:
                rows = [getattr(part[step], field) for part in parts]
                np.testing.assert_array_equal(getattr(batch, field), np.concatenate(rows))


def test_every_epoch_shows_every_window_once_in_a_new_order(store):
    config = config_for(store, batch_size=1)
    windows = Windows(store, ~split_documents(60, 0.2), 16)
    size = len(windows)
    rows = [batch.inputs[0].tolist() for batch in take(3 * size, train_batches(config, [store]))]
    epochs = [rows[:size], rows[size : 2 * size], rows[2 * size :]]
    expected = sorted(windows[index][:-1].tolist() for index in range(size))
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    neighbour = take(size, train_batches(config_for(store, batch_size=1, seed=1), [store]))
    assert [batch.inputs[0].tolist() for batch in neighbour] not in epochs


def test_no_document_is_both_trained_and_validated_on(store):
    for seed in (0, 1):
        config = config_for(store, seed=seed)
        validation = letters(validation_batches(config, [store]))
        training = letters(take(60, train_batches(config, [store])))
        assert len(validation) == 12
        assert not training & validation
        # All of the others, but perhaps one in the part behind the last window.
        assert len(training) >= 47
        if seed == 0:
            first = validation
    assert validation == first


def test_validation_drops_and_repeats_nothing(store):
    config = config_for(store, context_length=11, batch_size=7)
    batches = list(validation_batches(config, [store]))
    assert {batch.inputs.shape for batch in batches} == {(7, 11)}
    targets = np.concatenate([batch.targets[batch.targets_mask] for batch in batches])
    validation = letters(batches)
    expected = np.array(store.tokens[np.isin(store.tokens, list(validation))])
    # Every token of these documents and their markers, but for the very first.
    assert targets.size == expected.size + len(validation) - 1
    np.testing.assert_array_equal(np.sort(targets[targets != 0]), np.sort(expected))
    assert sum((~batch.targets_mask).sum() for batch in batches) > 0


def test_validation_is_the_same_each_time_and_for_each_seed(store):
    one = list(validation_batches(config_for(store), [store]))
    assert_equal(one, list(validation_batches(config_for(store, seed=5), [store])))
    assert_equal(one[:2], list(validation_batches(config_for(store), [store], max_batches=2)))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.0, 1.0), ()])
def test_mixture_keeps_its_proportions(store, tmp_path, weights):
    other = make_store(tmp_path / "other", first=61, documents=30)
    config = config_for(store, other, weights=weights, batch_size=4)
    batches = take(100, train_batches(config, [store, other]))
    from_other = np.mean([batch.targets.max(axis=1) > 60 for batch in batches])
    if weights:
        expected = weights[1] / sum(weights)
    else:
        expected = other.meta.num_tokens / (store.meta.num_tokens + other.meta.num_tokens)
    assert abs(from_other - expected) < 0.03
    assert_equal(batches[50:60], take(10, train_batches(config, [store, other], start_step=50)))
    assert len(letters(validation_batches(config, [store, other]))) == 12 + 6


def test_stores_of_different_tokenizers(store, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    other = write_store(tmp_path / "other", ["text"], tokenizer)
    with pytest.raises(ValueError, match="cannot be mixed: .*different tokenizers"):
        open_stores(config_for(store, other), str(tmp_path / "stdlib"))


def test_open_stores(store, tmp_path):
    config = DataConfig(stores=("stdlib", store.path))
    stores = open_stores(config, str(tmp_path / "stdlib"))
    assert [each.path for each in stores] == [str(tmp_path / "stdlib"), store.path]
    with pytest.raises(ValueError, match="no token store at .*nowhere"):
        open_stores(DataConfig(stores=(str(tmp_path / "nowhere"),)), str(tmp_path / "stdlib"))


@pytest.mark.parametrize("make", [train_batches, validation_batches])
def test_bad_input(store, tmp_path, make):
    config = config_for(store)
    with pytest.raises(ValueError, match="batch_size=8 does not divide into 3 shares"):
        make(config, [store], shard_count=3)
    with pytest.raises(ValueError, match="shard_index=2 is not one of the 2 shares"):
        make(config, [store], shard_index=2, shard_count=2)
    single = write_store(tmp_path / "single", ["a" * 100])
    with pytest.raises(ValueError, match="token store .*single: .*0.2 of 1 documents"):
        make(config_for(single), [single])


def test_too_little_text(store):
    config = config_for(store, context_length=100_000)
    with pytest.raises(ValueError, match="fewer than the 100001 of one row"):
        train_batches(config, [store])
    (batch,) = validation_batches(config, [store])
    assert len(letters([batch])) == 12


def test_negative_start(store):
    with pytest.raises(ValueError, match="start_step must not be negative, but is -1"):
        train_batches(config_for(store), [store], start_step=-1)


def test_no_validation(store):
    config = config_for(store, validation_fraction=0.0)
    assert len(letters(take(60, train_batches(config, [store])))) >= 59
    with pytest.raises(ValueError, match="nothing to validate on"):
        validation_batches(config, [store])
