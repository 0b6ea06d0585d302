import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm.dataset.config import DataConfig
from xlstm.dataset.contiguous_rows import ContiguousRows
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.selected_documents import SelectedDocuments
from xlstm.dataset.testing import (
    assert_equal_batches,
    config_for,
    tokenizer_families,
    write_letter_store,
    write_store,
)
from xlstm.dataset.validation import open_validation_sets
from xlstm.dataset.windows import split_documents

CARRIED = {"shuffle": "contiguous", "carry_state": True}
TEXTS = ["hello wörld", "日本語 hello", "x", "naïve 🙂 world", "\N{EURO SIGN}" * 40, "the end"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_letter_store(tmp_path_factory.mktemp("data") / "store")


def held_out(*stores, **fields):
    (validation_set,) = open_validation_sets(config_for(*stores, **fields), stores)
    return validation_set


def carried(*stores, **fields):
    return held_out(*stores, **CARRIED, **fields)


def selected_documents(store, selected):
    """Returns the tokens of each selected document, as lists."""
    edges, tokens = store.documents[:], store.tokens[:].tolist()
    return [tokens[edges[i] : edges[i + 1]] for i in np.flatnonzero(selected)]


def lanes_of(documents, batch_size):
    """Returns what each row reads, computed in a simple way: (input, target, position) of each."""
    entries, starts, size = [], [], sum(map(len, documents))
    for document in documents:
        starts.append(len(entries))
        entries += [(token, i) for i, token in enumerate(document)]
    edges = [
        min(start for start in [*starts, size] if start >= row * size // batch_size)
        for row in range(batch_size)
    ]
    return [
        [
            (entries[x][0], entries[x + 1][0], entries[x][1] + 1)
            for x in range(first, min(stop, size - 1))
        ]
        for first, stop in zip(edges, [*edges[1:], size], strict=True)
    ]


def assert_batches_of(batches, lanes, width, bos_id):
    """Asserts that batches read some lanes."""
    assert len(batches) == -(-max(map(len, lanes)) // width)
    for number, batch in enumerate(batches):
        for row, lane in enumerate(lanes):
            piece = np.array(lane[number * width : (number + 1) * width]).reshape(-1, 3)
            size = len(piece)
            found = [array[row, :size] for array in (batch.inputs, batch.targets, batch.positions)]
            np.testing.assert_array_equal(np.stack(found, axis=1), piece)
            np.testing.assert_array_equal(batch.targets_mask[row], np.arange(width) < size)
            np.testing.assert_array_equal(batch.reset[row], batch.inputs[row] == bos_id)
            assert not batch.positions[row, size:].any()
            if not size:  # A row that has ended.
                assert batch.reset[row].all()
        assert {array.shape for array in vars(batch).values()} == {(len(lanes), width)}
        assert batch.positions.dtype == batch.inputs.dtype == np.int32


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    width=st.integers(1, 20),
    batch_size=st.integers(1, 8),
    data=st.data(),
)
def test_rows_of_any_documents(lengths, width, batch_size, data):
    texts = [chr(97 + i) * length for i, length in enumerate(lengths)]
    some = st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)).filter(any)
    selected = np.array(data.draw(some))
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(folder + "/store", texts)
        config = DataConfig(context_length=width, batch_size=batch_size)
        rows = ContiguousRows([SelectedDocuments(store, selected)], 0, config)
        batches = [rows.read(i, slice(0, batch_size)) for i in range(rows.num_batches)]
        lanes = lanes_of(selected_documents(store, selected), batch_size)
        assert_batches_of(batches, lanes, width, 0)
        counts = [rows.count_text_bytes(i) for i in range(rows.num_batches)]
        assert counts == [np.count_nonzero(batch.targets * batch.targets_mask) for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_each_store_comes_in_turn(store, tmp_path, batch_size):
    other = write_letter_store(tmp_path / "other", first=61, documents=30, seed=1)
    validation_set = carried(store, other, batch_size=batch_size, context_length=7)
    assert list(validation_set.stores) == [store, other]
    batches, width = list(validation_set.batches()), 7
    for each in (store, other):
        chosen = split_documents(each.meta.num_documents, 0.2)
        lanes = lanes_of(selected_documents(each, chosen), batch_size)
        count = -(-max(map(len, lanes)) // width)
        assert_batches_of(batches[:count], lanes, width, 0)
        batches = batches[count:]
    assert not batches


def join_rows(batches):
    """Returns the inputs of each row, of all batches, and after them the last target."""
    rows = []
    for row in range(len(batches[0].inputs)):
        parts = [batch.inputs[row, batch.targets_mask[row]] for batch in batches]
        targets = [batch.targets[row, batch.targets_mask[row]] for batch in batches]
        ends = np.concatenate(targets)[-1:]
        rows.append([*np.concatenate(parts).tolist(), *ends.tolist()])
    return rows


@pytest.mark.parametrize("batch_size, width", [(1, 4), (2, 3), (4, 16), (4, 1000), (20, 5)])
@pytest.mark.parametrize("has_bos", [False, True])
def test_rows_hold_whole_documents_of_the_ordinary_set(tmp_path, has_bos, batch_size, width):
    """With fewer documents than rows, and with documents longer than a batch."""
    kind, bos = "byte_level", "<s>" if has_bos else None
    tokenizer = JsonTokenizer(tokenizer_families()[kind], kind, None, bos)
    store = write_store(tmp_path / "store", TEXTS, tokenizer)
    sizes = {"validation_fraction": 0.0, "batch_size": batch_size, "context_length": width}
    sizes["validation_stores"] = (f"named={store.path}",)
    carrying, ordinary = carried(store, **sizes), held_out(store, **sizes)

    batches, documents = list(carrying.batches()), []
    for tokens in filter(None, join_rows(batches)):
        assert tokens[0] == tokenizer.bos_id
        edges = [i for i, token in enumerate(tokens) if token == tokenizer.bos_id]
        edges += [len(tokens)] * (tokens[-1] != tokenizer.bos_id)  # The end of the store.
        documents += [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert documents == selected_documents(store, np.ones(len(TEXTS), bool))

    count = sum(batch.targets_mask.sum() for batch in batches)
    assert count == sum(batch.targets_mask.sum() for batch in ordinary.batches())
    assert count == store.meta.num_tokens - 1
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert carrying.num_bytes() == ordinary.num_bytes() == text_bytes


def test_one_long_document_is_read_by_one_row(tmp_path):
    long = write_store(tmp_path / "long", ["x" * 100])
    sizes = {"validation_stores": (f"named={long.path}",), "validation_fraction": 0.0}
    batches = list(carried(long, **sizes, batch_size=4, context_length=8).batches())
    assert len(batches) == 13
    for number, batch in enumerate(batches):
        is_read = batch.targets_mask[0]
        assert np.flatnonzero(batch.reset[0, is_read]).tolist() == [0] * (number == 0)
        assert batch.reset[1:].all() and not batch.targets_mask[1:].any()
        expected = np.arange(8 * number + 1, 8 * number + 9)
        np.testing.assert_array_equal(batch.positions[0], np.where(expected <= 100, expected, 0))


def test_each_batch_continues_the_previous_one(store):
    batches = list(carried(store, validation_fraction=0.5, context_length=5).batches())
    assert len(batches) > 10 and batches[0].reset[:, 0].all()
    for one, other in zip(batches, batches[1:], strict=False):
        goes_on = other.targets_mask[:, 0]
        np.testing.assert_array_equal(other.inputs[goes_on, 0], one.targets[goes_on, -1])
        np.testing.assert_array_equal(other.reset[:, 0], other.inputs[:, 0] == 0)
        inside = goes_on & ~other.reset[:, 0]
        np.testing.assert_array_equal(other.positions[inside, 0], one.positions[inside, -1] + 1)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_each_batch(store, count):
    validation_set = carried(store)
    parts = [validation_set.batches(shard_index=i, shard_count=count) for i in range(count)]
    for batch, *shares in zip(validation_set.batches(), *parts, strict=True):
        for field, expected in vars(batch).items():
            rows = [getattr(share, field) for share in shares]
            np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_the_first_batches_and_their_bytes(store):
    validation_set = carried(store, batch_size=2)
    batches = list(validation_set.batches())
    assert len(batches) > 3
    for max_batches in (0, 1, 2, 100, None):
        found = list(validation_set.batches(max_batches=max_batches))
        assert_equal_batches(found, batches[:max_batches])
        num_bytes = sum(np.count_nonzero(batch.targets[batch.targets_mask]) for batch in found)
        assert validation_set.num_bytes(max_batches) == num_bytes


def test_bad_shards(store):
    with pytest.raises(ValueError, match="batch of 8 rows does not divide into 3 shards"):
        carried(store).batches(shard_count=3)


def test_a_damaged_store_is_told(tmp_path):
    store = write_letter_store(tmp_path / "store")
    batches = carried(store).batches()
    next(batches)
    store.problem = ValueError("it is damaged")
    with pytest.raises(ValueError, match="it is damaged"):
        next(batches)
