"""Rows of batches that read whole documents, to validate a model that carries its state."""

import bisect
from collections.abc import Sequence

import numpy as np

from xlstm.dataset.batch import Batch, padded_batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.selected_documents import SelectedDocuments


class ContiguousRows:
    """Whole documents as the rows of batches, each of which continues the previous batch.

    Each of the `B` rows reads its own documents of a store, from start to end and one after the
    other, `T` tokens in each batch. Row `r` starts with the first document that starts at or after
    position `r * N // B` of the store's `N` tokens, and ends where row `r + 1` starts. So every
    token of a store except the first is a target exactly once. Rows that have ended are padding
    until the longest row ends; then the next store starts.

    Attributes:
        num_batches: The number of global batches.
    """

    def __init__(self, stores: Sequence[SelectedDocuments], bos_id: int, config: DataConfig):
        """Computes where rows start, without reading any token.

        Args:
            stores: The documents of each store.
            bos_id: The marker at the start of every document.
            config: The configuration, with the context length and the batch size.
        """
        self._stores, self._bos_id = stores, bos_id
        self._context_length = config.context_length
        self._edges = [_row_edges(documents, config.batch_size) for documents in stores]
        counts = [-(-int(np.diff(edges).max()) // config.context_length) for edges in self._edges]
        self._firsts = np.cumsum([0, *counts]).tolist()  # The first batch of each store.
        self.num_batches = self._firsts[-1]

    def read(self, number: int, rows: slice) -> Batch:
        """Returns some rows of a global batch."""
        documents, starts, stops = self._locate(number)
        windows, offsets = [], []
        for start, stop in zip(starts[rows], stops[rows], strict=True):
            # Inputs and the last target; a row that has ended has none of them.
            windows.append(documents.read(start, stop + 1 if start < stop else stop))
            offsets.append(documents.offset_in_document(start))
        batch = padded_batch(windows, (len(windows), self._context_length + 1), self._bos_id)
        return batch.replace(positions=_target_positions(batch, np.array(offsets)))

    def count_text_bytes(self, number: int) -> int | None:
        """Counts the bytes of text of the targets of a global batch; None if unknown."""
        documents, *ranges = self._locate(number)
        counts = [
            documents.count_text_bytes(start + 1, stop + 1)
            for start, stop in zip(*ranges, strict=True)
        ]
        return None if None in counts else sum(counts)

    def _locate(self, number: int) -> tuple[SelectedDocuments, list[int], list[int]]:
        """Returns the documents of a batch, and the range of positions that each row reads."""
        store = bisect.bisect_right(self._firsts, number) - 1
        edges, skipped = self._edges[store], number - self._firsts[store]
        starts = np.minimum(edges[:-1] + skipped * self._context_length, edges[1:])
        stops = np.minimum(starts + self._context_length, edges[1:])
        return self._stores[store], starts.tolist(), stops.tolist()


def _row_edges(documents: SelectedDocuments, batch_size: int) -> np.ndarray:
    """Returns `(B + 1,)` int64: the position of the first input of each row, and the end."""
    size = documents.num_tokens
    starts = [documents.next_start(row * size // batch_size) for row in range(batch_size)]
    # The last token is no input, for no target follows it.
    return np.minimum([*starts, size], size - 1)


def _target_positions(batch: Batch, offsets: np.ndarray) -> np.ndarray:
    """Returns `Batch.positions`, from the index of the first input of each row in its document."""
    columns = np.arange(batch.inputs.shape[1])
    starts = np.where(batch.reset, columns, -offsets[:, None])
    starts = np.maximum.accumulate(starts, axis=1)  # Where the document of each input starts.
    return np.where(batch.targets_mask, columns + 1 - starts, 0).astype(np.int32)
