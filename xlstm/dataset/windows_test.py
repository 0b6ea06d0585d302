import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm.dataset.testing import write_store
from xlstm.dataset.windows import ConcatenatedWindows, Windows, split_documents


def one_after_another(store, chosen):
    """Returns the tokens of the selected documents, computed in a simple way."""
    edges = store.documents
    pieces = [store.tokens[edges[i] : edges[i + 1]] for i in np.flatnonzero(chosen)]
    return np.concatenate([np.empty(0, np.int32), *pieces])


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    context_length=st.integers(1, 20),
    keep_partial=st.booleans(),
    data=st.data(),
)
def test_windows_tile_the_chosen_documents(lengths, context_length, keep_partial, data):
    texts = [chr(97 + i) * length for i, length in enumerate(lengths)]
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(folder + "/store", texts)
        windows = Windows(store, chosen, context_length, keep_partial=keep_partial)
        tokens = one_after_another(store, chosen)
        assert windows.num_tokens == tokens.size
        targets = max(tokens.size - 1, 0)
        expected = -(-targets // context_length) if keep_partial else targets // context_length
        assert len(windows) == expected
        for index in range(len(windows)):
            start = index * context_length
            np.testing.assert_array_equal(
                windows[index], tokens[start : start + context_length + 1]
            )
            assert windows[index].dtype == np.int32
            first, last = windows.document_range(index)
            among = np.arange(len(texts))
            inside = one_after_another(store, chosen & (first <= among) & (among <= last))
            before = one_after_another(store, chosen & (among < first)).size
            begin, end = start - before, start - before + windows[index].size
            assert 0 <= begin <= len(texts[first]) and chosen[first]
            assert inside.size - len(texts[last]) <= end <= inside.size and chosen[last]


def test_no_window_outside(tmp_path):
    store = write_store(tmp_path / "store", ["0123456789"])
    windows = Windows(store, np.array([True]), 5)
    assert len(windows) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"no window {index}: .* below 2"):
            windows[index]


def test_joined_windows(tmp_path):
    texts = ["aaaaa", "", "bbbbbbb"]
    stores = [write_store(tmp_path / str(i), [text + "!"]) for i, text in enumerate(texts)]
    parts = [Windows(store, np.array([True]), 3) for store in stores]
    assert [len(part) for part in parts] == [2, 0, 2]
    joined = ConcatenatedWindows(parts)
    assert len(joined) == 4
    assert [joined.locate(number) for number in range(4)] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    found = [bytes(joined[number].astype(np.uint8)) for number in range(4)]
    assert found == [b"\0aaa", b"aaa!", b"\0bbb", b"bbbb"]
    with pytest.raises(IndexError):
        joined[4]


@given(st.integers(1, 300), st.floats(0, 0.99), st.floats(0, 0.99))
def test_split_takes_the_share_and_grows_by_joining(count, one, other):
    small, large = sorted((one, other))
    for fraction in (small, large):
        if 0 < fraction and not round(count * fraction):
            with pytest.raises(ValueError, match="selects none"):
                split_documents(count, fraction)
            return
    few, many = split_documents(count, small), split_documents(count, large)
    assert few.sum() == round(count * small)
    assert np.all(many[few])


def test_split_scatters():
    chosen = np.flatnonzero(split_documents(10_000, 0.1))
    quarters = np.histogram(chosen, bins=4, range=(0, 10_000))[0]
    assert np.all(np.abs(quarters - 250) < 60)


def test_split_of_too_few_documents():
    with pytest.raises(ValueError, match=r"0.02 of 10 documents .*fraction \(0.1 selects one"):
        split_documents(10, 0.02)
    with pytest.raises(ValueError, match="0.02 of 1 documents .*or 0 to train without"):
        split_documents(1, 0.02)
    assert not split_documents(1, 0).any()
