"""Cuts a token store into windows: which documents belong to which split, and where rows lie."""

import bisect
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from xlstm.dataset.permutation import splitmix64
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import Tokenizer


def split_documents(num_documents: int, fraction: float) -> np.ndarray:
    """Chooses the validation documents, by a fixed rule that knows only their numbers.

    Every document number has a fixed hash, and those with the smallest are chosen: scattered over
    the store, and with a larger fraction documents only join.

    Args:
        num_documents: Documents in the store.
        fraction: The share to choose, in [0, 1).

    Returns:
        `(num_documents,)` bool, True for validation.

    Raises:
        ValueError: The fraction is above 0, but of so few documents it is not one.
    """
    count = round(num_documents * fraction)
    if fraction > 0 and not count:
        enough = f" ({1 / num_documents:.2g} gives one)" if num_documents > 1 else ""
        raise ValueError(
            f"validation_fraction={fraction} of {num_documents} documents is not a single one: "
            f"set a larger fraction{enough}, or 0 to train without validation"
        )
    chosen = np.zeros(num_documents, bool)
    chosen[np.argsort(scatter(num_documents), kind="stable")[:count]] = True
    return chosen


def validation_documents(store: TokenStore, fraction: float) -> np.ndarray:
    """Chooses the validation documents of a store.

    Args:
        store: The store.
        fraction: See `split_documents`.

    Returns:
        `(num_documents,)` bool, True for validation.

    Raises:
        ValueError: See `split_documents`.
    """
    try:
        return split_documents(store.meta.num_documents, fraction)
    except ValueError as error:
        raise ValueError(f"token store {store.path}: {error}") from error


def scatter(count: int) -> np.ndarray:
    """Returns `(count,)` uint64: a fixed hash of each of the numbers 0 to `count - 1`."""
    return splitmix64(0, np.arange(count, dtype=np.uint64))


class Windows:
    """The windows of some documents of a store, read as if they lay one behind the other.

    Window `i` covers `T + 1` tokens from token `i * T` on, so that every token but the first is a
    target exactly once. `len()` counts the full windows; what is left over behind the last one is
    a window only with `keep_partial`.
    """

    def __init__(
        self,
        store: TokenStore,
        chosen: np.ndarray,
        context_length: int,
        *,
        keep_partial: bool = False,
    ):
        """Finds where the windows lie, without reading any token.

        Args:
            store: The store.
            chosen: `(num_documents,)` bool, the documents to read.
            context_length: T.
            keep_partial: Whether a last window with fewer tokens counts.
        """
        # Neighbouring documents are one stretch of the file: few stretches, so few copies a window.
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        documents = store.documents[:]  # Too much to keep.
        starts, stops = documents[edges[::2]], documents[edges[1::2]]
        self._store = store
        self._ends = np.cumsum(stops - starts)
        self._shifts = (
            stops - self._ends
        )  # From a place in the row of stretches to one in the file.
        self._context_length = context_length
        self.num_tokens = int(self._ends[-1]) if self._ends.size else 0
        targets = max(self.num_tokens - 1, 0)
        self._length = -(-targets // context_length) if keep_partial else targets // context_length

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window `index`: `(T + 1,)` int32, fewer in a partial last window."""
        place, stop = self._bounds(index)
        window, filled = np.empty(stop - place, np.int32), 0
        for begin, end in self._spans(place, stop):
            window[filled : filled + end - begin] = self._store.tokens[begin:end]
            filled += end - begin
        return window

    def count_text_bytes(self, index: int) -> int | None:
        """Counts the bytes of text of the targets of window `index`: all tokens but the first.

        Returns:
            See `TokenStore.count_text_bytes`.
        """
        place, stop = self._bounds(index)
        count = functools.partial(self._store.count_text_bytes, tokenizer=self._tokenizer)
        counts = [count(begin, end) for begin, end in self._spans(place + 1, stop)]
        return None if None in counts else sum(counts)

    def documents(self, index: int) -> tuple[int, int]:
        """Returns which documents window `index` begins and ends in, by their number in the store.

        Those between them are in it too, as far as they were chosen.
        """
        first, stop = self._bounds(index)
        places = [place + int(self._shifts[self._stretch(place)]) for place in (first, stop - 1)]
        first, last = (bisect.bisect_right(self._store.documents, x) - 1 for x in places)
        return first, last

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._store.load_tokenizer()

    def _bounds(self, index: int) -> tuple[int, int]:
        """Returns where a window begins and ends, in the row of stretches."""
        if not 0 <= index < self._length:
            raise IndexError(f"there is no window {index}, only {self._length}")
        place = index * self._context_length
        return place, min(place + self._context_length + 1, self.num_tokens)

    def _spans(self, place: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yields where tokens of the row of stretches lie in the file: beginnings and ends."""
        stretch = self._stretch(place)
        while place < stop:
            size = min(int(self._ends[stretch]), stop) - place
            begin = place + int(self._shifts[stretch])
            yield begin, begin + size
            place, stretch = place + size, stretch + 1

    def _stretch(self, place: int) -> int:
        """Returns the number of the stretch that a place lies in."""
        return int(np.searchsorted(self._ends, place, side="right"))


class JoinedWindows:
    """The windows of several `Windows`, numbered on from one to the next."""

    def __init__(self, parts: Sequence[Windows]):
        """Takes the parts, in order."""
        self._parts = parts
        self._firsts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self._firsts[-1]

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns a window, see `Windows`."""
        part, index = self.locate(number)
        return self._parts[part][index]

    def count_text_bytes(self, number: int) -> int | None:
        """Counts the text of a window's targets, see `Windows.count_text_bytes`."""
        part, index = self.locate(number)
        return self._parts[part].count_text_bytes(index)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns which part a window is in, and its number there."""
        part = bisect.bisect_right(self._firsts, number) - 1
        return part, number - self._firsts[part]
