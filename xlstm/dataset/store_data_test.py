import itertools

import grain
import numpy as np
import pytest

from xlstm.dataset.batch import remaining_phases, rows_before
from xlstm.dataset.config import SHUFFLES, DataConfig
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.store_data import batch_origins, open_stores, train_batches
from xlstm.dataset.testing import (
    assert_equal_batches,
    config_for,
    tokenizer_families,
    write_letter_store,
    write_store,
    write_tokenizer_json,
)
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.dataset.windows import Windows, split_documents

FIELDS = ("inputs", "targets", "targets_mask", "reset")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_letter_store(tmp_path_factory.mktemp("data") / "store")


def take(count, batches):
    return list(itertools.islice(batches, count))


def test_fields_of_a_batch(store):
    (batch,) = take(1, train_batches(config_for(store), [store]))
    for field in FIELDS:
        assert getattr(batch, field).shape == (8, 16)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.targets_mask.dtype == batch.reset.dtype == bool
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.inputs[:, 1:])
    np.testing.assert_array_equal(batch.reset, batch.inputs == store.meta.eod_id)
    assert batch.targets_mask.all() and batch.reset.any()
    # Where no document starts, the same letter continues.
    goes_on = (batch.inputs != 0) & (batch.targets != 0)
    np.testing.assert_array_equal(batch.inputs[goes_on], batch.targets[goes_on])


def test_the_seed_decides(store):
    config = config_for(store)
    first = take(10, train_batches(config, [store]))
    assert_equal_batches(first, take(10, train_batches(config, [store])))
    other = take(10, train_batches(config_for(store, seed=1), [store]))
    assert any(np.any(a.inputs != b.inputs) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("start", [1, 7, 100])
def test_starting_later_is_skipping(store, start, shuffle):
    config = config_for(store, shuffle=shuffle)
    skipped = take(start + 5, train_batches(config, [store]))[start:]
    assert_equal_batches(take(5, train_batches(config, [store], start_step=start)), skipped)


@pytest.mark.parametrize("shuffle", ["permutation", "contiguous"])
def test_any_step_is_at_hand(store, shuffle):
    far = 10**12
    config = config_for(store, shuffle=shuffle)
    (batch,) = take(1, train_batches(config, [store], start_step=far))
    before = take(2, train_batches(config, [store], start_step=far - 1))
    assert_equal_batches([batch], before[1:])


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_each_batch(store, count, shuffle):
    config = config_for(store, shuffle=shuffle)
    whole = take(4, train_batches(config, [store], start_step=3))
    parts = [
        take(4, train_batches(config, [store], start_step=3, shard_index=i, shard_count=count))
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
    neighbor = take(size, train_batches(config_for(store, batch_size=1, seed=1), [store]))
    assert [batch.inputs[0].tolist() for batch in neighbor] not in epochs


def test_a_length_at_which_grain_leaves_the_last_window_out(tmp_path):
    """With 4^8 + 1 windows, an epoch of Grain's shuffle repeats another window."""
    size = 4**8 + 1
    tall = write_store(tmp_path / "tall", ["x" * (size - 1) + "z"])
    config = config_for(tall, context_length=1, batch_size=size, validation_fraction=0.0)
    for batch in take(2, train_batches(config, [tall])):
        found = np.stack([batch.inputs[:, 0], batch.targets[:, 0]], axis=1)
        tokens = tall.tokens[:]
        expected = np.stack([tokens[:-1], tokens[1:]], axis=1)
        assert len(expected) == size and expected[-1].tolist() == [ord("x"), ord("z")]
        np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
        assert np.sum(batch.targets == ord("z")) == 1


def test_stores_of_the_same_size_have_orders_of_their_own(store, tmp_path):
    same = write_letter_store(tmp_path / "same", first=61)
    config = config_for(store, same, batch_size=1)
    (size,) = {len(Windows(s, ~split_documents(60, 0.2), 16)) for s in (store, same)}
    rows = [batch.inputs[0] for batch in take(4 * size, train_batches(config, [store, same]))]
    orders = [[row for row in rows if (row.max() > 60) == is_same] for is_same in (False, True)]
    orders = [
        np.maximum(np.stack(order[:size]), offset) - offset
        for order, offset in zip(orders, (0, 60), strict=True)
    ]
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist())
    assert np.mean(np.all(orders[0] == orders[1], axis=1)) < 0.2


def test_the_order_of_runs_that_began_before(store, tmp_path):
    """It is Grain's order, and it never changes."""
    other = write_letter_store(tmp_path / "other", first=61, documents=30)
    config = config_for(store, other, shuffle="grain", batch_size=1, seed=3)
    rows, orders, sizes = [], [], []
    for index, each in enumerate((store, other)):
        windows = Windows(each, ~split_documents(each.meta.num_documents, 0.2), 16)
        seed = int(np.random.SeedSequence([3, index]).generate_state(1)[0])
        numbers = grain.MapDataset.range(len(rows), len(rows) + len(windows))
        orders.append(numbers.shuffle(seed=seed).repeat(100))
        sizes.append(windows.num_tokens)
        rows += [windows[index] for index in range(len(windows))]
    order = grain.MapDataset.mix(orders, sizes)
    batches = take(200, train_batches(config, [store, other]))
    found = np.stack([batch.inputs[0] for batch in batches])
    np.testing.assert_array_equal(found, np.stack([rows[order[i]][:-1] for i in range(200)]))
    new = take(200, train_batches(config_for(store, other, batch_size=1, seed=3), [store, other]))
    assert np.mean([np.array_equal(a, b.inputs[0]) for a, b in zip(found, new, strict=True)]) < 0.2


def windows_of(config, *stores):
    """Returns the windows of each store that are trained on, as lists of tokens."""
    rows = []
    for each in stores:
        selected = ~split_documents(each.meta.num_documents, config.validation_fraction)
        windows = Windows(each, selected, config.context_length)
        rows.append([windows[index].tolist() for index in range(len(windows))])
    return rows


def rows_in(batch):
    """Returns the tokens of each row, with the last target."""
    return np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1).tolist()


# With a context of 300, there are fewer windows than rows.
@pytest.mark.parametrize("fields", [{}, {"context_length": 300}, {"validation_fraction": 0.0}])
@pytest.mark.parametrize("num_stores", [1, 2])
def test_each_row_continues_in_the_next_batch(store, tmp_path, num_stores, fields):
    other = write_letter_store(tmp_path / "other", first=61, documents=30)
    stores = [store, other][:num_stores]
    config = config_for(*stores, shuffle="contiguous", **fields)
    of_stores = windows_of(config, *stores)
    ring, seams = sum(of_stores, []), [0, len(of_stores[0])][:num_stores]
    batches = take(len(ring) + 9, train_batches(config, stores))
    for step, batch in enumerate(batches):
        indices = [(row * len(ring) // 8 + step) % len(ring) for row in range(8)]
        assert rows_in(batch) == [ring[index] for index in indices]
        is_seam = np.isin(indices, seams)
        assert batch.reset[is_seam, 0].all()
        if step:
            last = batches[step - 1].targets[:, -1]
            np.testing.assert_array_equal(batch.inputs[~is_seam, 0], last[~is_seam])


@pytest.mark.parametrize("start", [0, 5])
def test_rows_that_continue_show_every_window_equally_often(store, start):
    config = config_for(store, shuffle="contiguous")
    (windows,) = windows_of(config, store)
    batches = take(len(windows), train_batches(config, [store], start_step=start))
    found = sum(map(rows_in, batches), [])
    assert sorted(found) == sorted(windows * 8)
    # Each row shows all of them.
    for row in range(8):
        assert sorted(rows_in(batch)[row] for batch in batches) == sorted(windows)


def test_the_first_window_of_a_store_starts_a_document(tmp_path):
    """Even if the first document is held out, and if documents end with another marker."""
    tokenizer = JsonTokenizer(tokenizer_families()["byte_level"], "x", None, "<s>")
    assert tokenizer.bos_id != tokenizer.eod_id
    fields = {"validation_fraction": 0.8, "context_length": 7}
    assert split_documents(12, 0.8)[0]
    stores = [write_store(tmp_path / x, [x * 30] * 12, tokenizer) for x in ("a", "b")]
    config = config_for(*stores, shuffle="contiguous", batch_size=2, **fields)
    one, two = windows_of(config, *stores)
    batches = take(2 * len(one + two), train_batches(config, stores))
    starts = [step for step, batch in enumerate(batches) if rows_in(batch)[0] in (one[0], two[0])]
    assert starts == [0, len(one), 2 * len(one), 3 * len(one)]
    for step in starts:
        assert batches[step].inputs[0, 0] == tokenizer.bos_id and batches[step].reset[0, 0]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.0, 1.0), ()])
def test_mixture_keeps_its_proportions(store, tmp_path, weights):
    other = write_letter_store(tmp_path / "other", first=61, documents=30)
    config = config_for(store, other, weights=weights, batch_size=4)
    batches = take(100, train_batches(config, [store, other]))
    from_other = np.mean([batch.targets.max(axis=1) > 60 for batch in batches])
    if weights:
        expected = weights[1] / sum(weights)
    else:
        expected = other.meta.num_tokens / (store.meta.num_tokens + other.meta.num_tokens)
    assert abs(from_other - expected) < 0.03
    assert_equal_batches(
        batches[50:60], take(10, train_batches(config, [store, other], start_step=50))
    )


def test_stores_of_different_tokenizers(store, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    other = write_store(tmp_path / "other", ["text"], tokenizer)
    with pytest.raises(ValueError, match="cannot be used in one run: .*different tokenizers"):
        open_stores(config_for(store, other), str(tmp_path / "stdlib"))


def test_open_stores(store, tmp_path):
    config = DataConfig(stores=("stdlib", store.path))
    stores = open_stores(config, str(tmp_path / "stdlib"))
    assert [each.path for each in stores] == [str(tmp_path / "stdlib"), store.path]
    with pytest.raises(ValueError, match="no token store at .*nowhere"):
        open_stores(DataConfig(stores=(str(tmp_path / "nowhere"),)), str(tmp_path / "stdlib"))


def test_bad_input(store, tmp_path):
    config = config_for(store)
    with pytest.raises(ValueError, match="batch of 8 rows does not divide into 3 shards"):
        train_batches(config, [store], shard_count=3)
    with pytest.raises(ValueError, match="shard_index=2: expected one from 0 to 1"):
        train_batches(config, [store], shard_index=2, shard_count=2)
    single = write_store(tmp_path / "single", ["a" * 100])
    with pytest.raises(ValueError, match="token store .*single: .*0.2 of 1 documents"):
        train_batches(config_for(single), [single])


def test_too_little_text(store):
    config = config_for(store, context_length=100_000)
    with pytest.raises(ValueError, match="expected at least the 100001 of one row"):
        train_batches(config, [store])


def test_negative_start(store):
    with pytest.raises(ValueError, match="the step must not be negative, but is -1"):
        train_batches(config_for(store), [store], start_step=-1)
    with pytest.raises(ValueError, match="the step must not be negative, but is -1"):
        batch_origins(config_for(store), [store], -1)


@pytest.mark.parametrize("start", [0, 2, 3, 5, 40])
def test_growing_batches_go_through_the_same_rows(store, start):
    config = config_for(store, ramp_batch_sizes=(2, 4), ramp_steps=(3, 2))
    batches = take(4, train_batches(config, [store], start_step=start))
    sizes = [remaining_phases(config, step)[0].batch_size for step in range(start, start + 4)]
    assert [len(batch.inputs) for batch in batches] == sizes
    single = train_batches(
        config_for(store, batch_size=1), [store], start_step=rows_before(config, start)
    )
    rows = np.concatenate([batch.inputs for batch in take(sum(sizes), single)])
    np.testing.assert_array_equal(np.concatenate([batch.inputs for batch in batches]), rows)
    parts = [
        take(4, train_batches(config, [store], start_step=start, shard_index=i, shard_count=2))
        for i in range(2)
    ]
    for batch, *shares in zip(batches, *parts, strict=True):
        np.testing.assert_array_equal(
            batch.inputs, np.concatenate([share.inputs for share in shares])
        )


def test_growing_batches_that_cannot_be_shared(store):
    config = config_for(store, ramp_batch_sizes=(2,), ramp_steps=(3,))
    with pytest.raises(ValueError, match="batch of 2 rows does not divide into 4 shards"):
        train_batches(config, [store], start_step=2, shard_count=4)
    assert len(next(train_batches(config, [store], start_step=3, shard_count=4)).inputs) == 2


@pytest.mark.parametrize(
    "order", [{"ramp_batch_sizes": (4,), "ramp_steps": (3,)}, {"shuffle": "contiguous"}]
)
@pytest.mark.parametrize("step", [0, 4, 10**6])
def test_origins(store, tmp_path, step, order):
    other = write_letter_store(tmp_path / "other", first=61, documents=30, seed=1)
    stores = {each.path: each for each in (store, other)}
    config = config_for(*stores.values(), **order)
    (batch,) = take(1, train_batches(config, [store, other], start_step=step))
    origins = batch_origins(config, [store, other], step)
    assert {origin.store for origin in origins} == set(stores)
    for origin, inputs, targets in zip(origins, batch.inputs, batch.targets, strict=True):
        row = bytes([*inputs, targets[-1]])
        edges, tokens = stores[origin.store].documents[:], stores[origin.store].tokens
        held_out = split_documents(len(edges) - 1, 0.2)
        documents = [
            bytes(tokens[edges[i] : edges[i + 1]])
            for i in range(origin.first_document, origin.last_document + 1)
            if not held_out[i]
        ]
        text = b"".join(documents)
        begin = text.find(row)
        # It starts in the first of them and ends in the last.
        assert 0 <= begin < len(documents[0])
        assert len(text) - len(documents[-1]) < begin + len(row) <= len(text)
