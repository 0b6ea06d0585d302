"""Some documents of a token store as one text."""

import bisect
import functools
from collections.abc import Iterator

import numpy as np

from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import Tokenizer


class SelectedDocuments:
    """Some documents of a store, read as if they were concatenated.

    A position is the index of a token in their concatenation.

    Attributes:
        num_tokens: The number of positions.
    """

    def __init__(self, store: TokenStore, selected: np.ndarray):
        """Locates the documents, without reading any token.

        Args:
            store: The store.
            selected: `(num_documents,)` bool, the documents to read.
        """
        # Consecutive documents are one segment of the file, so that reading takes few copies.
        edges = np.flatnonzero(np.diff(selected, prepend=False, append=False))
        documents = store.documents[:]  # Too large to keep in memory.
        starts, stops = documents[edges[::2]], documents[edges[1::2]]
        self._store = store
        self._ends = np.cumsum(stops - starts)
        self._shifts = stops - self._ends  # Index in the file minus position, for each segment.
        self.num_tokens = int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens of a range of positions: `(stop - start,)` int32."""
        tokens, filled = np.empty(stop - start, np.int32), 0
        for first, end in self._file_ranges(start, stop):
            tokens[filled : filled + end - first] = self._store.tokens[first:end]
            filled += end - first
        return tokens

    def count_text_bytes(self, start: int, stop: int) -> int | None:
        """Counts the bytes of text of a range of positions; see `TokenStore.count_text_bytes`."""
        count = functools.partial(self._store.count_text_bytes, tokenizer=self._tokenizer)
        counts = [count(first, end) for first, end in self._file_ranges(start, stop)]
        return None if None in counts else sum(counts)

    def document_at(self, position: int) -> int:
        """Returns the index, in the store, of the document that holds a position."""
        return bisect.bisect_right(self._store.documents, self._file_index(position)) - 1

    def offset_in_document(self, position: int) -> int:
        """Returns the number of tokens between the start of its document and a position."""
        start = self._store.documents[self.document_at(position)]
        return self._file_index(position) - int(start)

    def next_start(self, position: int) -> int:
        """Returns the position of the first document that starts at or after a position.

        If there is none, this is `num_tokens`.
        """
        # A document that is not selected, after a segment, has the position of the next segment.
        index = self._file_index(position)
        documents = self._store.documents
        return position + int(documents[bisect.bisect_left(documents, index)]) - index

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._store.load_tokenizer()

    def _file_ranges(self, position: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yields the ranges of token indices in the file for a range of positions."""
        segment = self._segment(position)
        while position < stop:
            size = min(int(self._ends[segment]), stop) - position
            first = position + int(self._shifts[segment])
            yield first, first + size
            position, segment = position + size, segment + 1

    def _file_index(self, position: int) -> int:
        """Returns the index in the file of the token at a position."""
        return position + int(self._shifts[self._segment(position)])

    def _segment(self, position: int) -> int:
        """Returns the index of the segment that holds a position."""
        return int(np.searchsorted(self._ends, position, side="right"))
