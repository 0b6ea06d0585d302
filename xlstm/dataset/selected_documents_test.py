import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm.dataset.selected_documents import SelectedDocuments
from xlstm.dataset.testing import write_store


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    data=st.data(),
)
def test_any_position(lengths, data):
    texts = [chr(97 + i) * length for i, length in enumerate(lengths)]
    some = st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)).filter(any)
    selected = np.array(data.draw(some))
    expected = [  # (document, offset, token) of each position.
        (i, offset, ord(letter))
        for i, text in enumerate(texts)
        for offset, letter in enumerate("\0" + text)
        if selected[i]
    ]
    with tempfile.TemporaryDirectory() as folder:
        documents = SelectedDocuments(write_store(folder + "/store", texts), selected)
        assert documents.num_tokens == len(expected)
        for position, (document, offset, _) in enumerate(expected):
            assert documents.document_at(position) == document
            assert documents.offset_in_document(position) == offset
            later = [x for x in range(position, len(expected)) if expected[x][1] == 0]
            assert documents.next_start(position) == min(later, default=len(expected))
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
        tokens = [token for _, _, token in expected[start:stop]]
        assert documents.read(start, stop).tolist() == tokens
        assert documents.count_text_bytes(start, stop) == np.count_nonzero(tokens)


@pytest.mark.parametrize("selected, size", [([False, False], 0), ([True, False], 4)])
def test_how_many_tokens(tmp_path, selected, size):
    store = write_store(tmp_path / "store", ["abc", "de"])
    assert SelectedDocuments(store, np.array(selected)).num_tokens == size
