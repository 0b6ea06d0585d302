"""Windows of a token store: its split into training and validation, and rows of tokens."""

import bisect
from collections.abc import Sequence

import numpy as np

from xlstm.dataset.permutation import hashed_order
from xlstm.dataset.selected_documents import SelectedDocuments
from xlstm.dataset.token_store import TokenStore


def split_documents(num_documents: int, fraction: float) -> np.ndarray:
    """Selects the validation documents by a fixed rule that depends only on their indices.

    The documents whose indices have the smallest hashes are selected. So they are spread over the
    store, and a larger fraction only adds documents.

    Args:
        num_documents: The number of documents in the store.
        fraction: The fraction to select, in [0, 1).

    Returns:
        `(num_documents,)` bool, True for validation.

    Raises:
        ValueError: The fraction is above 0 but selects no document.
    """
    count = round(num_documents * fraction)
    if fraction > 0 and not count:
        enough = f" ({1 / num_documents:.2g} selects one)" if num_documents > 1 else ""
        raise ValueError(
            f"validation_fraction={fraction} of {num_documents} documents selects none: set a"
            f" larger fraction{enough}, or 0 to train without validation"
        )
    selected = np.zeros(num_documents, bool)
    selected[hashed_order(num_documents)[:count]] = True
    return selected


def validation_documents(store: TokenStore, fraction: float) -> np.ndarray:
    """Selects the validation documents of a store.

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


class Windows:
    """The windows of some documents of a store.

    Window `i` holds the `T + 1` tokens from position `i * T` on (see `SelectedDocuments`), so that
    every token except the first is a target exactly once. `len()` is the number of windows. With
    `keep_partial`, the tokens after the last full window are a window too.
    """

    def __init__(
        self,
        store: TokenStore,
        selected: np.ndarray,
        context_length: int,
        *,
        keep_partial: bool = False,
    ):
        """Locates the windows, without reading any token.

        Args:
            store: The store.
            selected: `(num_documents,)` bool, the documents to read.
            context_length: `T`.
            keep_partial: Whether to include a last window with fewer tokens.
        """
        self._documents = SelectedDocuments(store, selected)
        self._context_length = context_length
        self.num_tokens = self._documents.num_tokens
        targets = max(self.num_tokens - 1, 0)
        self._length = -(-targets // context_length) if keep_partial else targets // context_length

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window `index`: `(T + 1,)` int32, fewer in a partial last window."""
        return self._documents.read(*self._bounds(index))

    def count_text_bytes(self, index: int) -> int | None:
        """Counts the bytes of text of the targets of window `index`: all tokens except the first.

        Returns:
            See `TokenStore.count_text_bytes`.
        """
        start, stop = self._bounds(index)
        return self._documents.count_text_bytes(start + 1, stop)

    def document_range(self, index: int) -> tuple[int, int]:
        """Returns the indices, in the store, of the first and last document of window `index`.

        The window holds the selected documents between them.
        """
        start, stop = self._bounds(index)
        return self._documents.document_at(start), self._documents.document_at(stop - 1)

    def _bounds(self, index: int) -> tuple[int, int]:
        """Returns the first position of a window and the position after its last."""
        if not 0 <= index < self._length:
            raise IndexError(f"no window {index}: expected an index from 0, below {self._length}")
        start = index * self._context_length
        return start, min(start + self._context_length + 1, self.num_tokens)


class ConcatenatedWindows:
    """The windows of several `Windows`, with consecutive indices."""

    def __init__(self, parts: Sequence[Windows]):
        """Takes the parts, in order."""
        self._parts = parts
        self._firsts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self._firsts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns a window; see `Windows`."""
        part, local_index = self.locate(index)
        return self._parts[part][local_index]

    def count_text_bytes(self, index: int) -> int | None:
        """Counts the bytes of text of a window's targets; see `Windows.count_text_bytes`."""
        part, local_index = self.locate(index)
        return self._parts[part].count_text_bytes(local_index)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the part that holds a window, and the window's index in that part."""
        part = bisect.bisect_right(self._firsts, index) - 1
        return part, index - self._firsts[part]
