"""Validation sets from token stores."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from xlstm.dataset.batch import Batch, padded_batch, rows_per_shard
from xlstm.dataset.config import DataConfig
from xlstm.dataset.contiguous_rows import ContiguousRows
from xlstm.dataset.permutation import hashed_order
from xlstm.dataset.selected_documents import SelectedDocuments
from xlstm.dataset.token_store import TokenStore, check_same_tokenizer
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.dataset.windows import ConcatenatedWindows, Windows, validation_documents

HELD_OUT = ""  # The name of the set of documents held out from the training stores.


class ShuffledRows:
    """Windows as the rows of batches, in a fixed order.

    The order is pseudorandom, so that the first few batches are a fair sample. It depends neither
    on the seed of the run nor on the weights of its stores.

    Attributes:
        num_batches: The number of global batches.
    """

    def __init__(self, windows: ConcatenatedWindows, bos_id: int, config: DataConfig):
        """Computes the order, without reading any token.

        Args:
            windows: The rows, of `data.context_length + 1` tokens or, at the end of a store, fewer.
            bos_id: The marker at the start of every document.
            config: The configuration, with the context length and the batch size.
        """
        self._windows, self._bos_id = windows, bos_id
        self._batch_size, self._width = config.batch_size, config.context_length + 1
        self._order = hashed_order(len(windows))
        self.num_batches = -(-len(windows) // config.batch_size)

    def read(self, number: int, rows: slice) -> Batch:
        """Returns some rows of a global batch."""
        windows = [self._windows[index] for index in self._indices(number)[rows]]
        return padded_batch(windows, (rows.stop - rows.start, self._width), self._bos_id)

    def count_text_bytes(self, number: int) -> int | None:
        """Counts the bytes of text of the targets of a global batch; None if unknown."""
        counts = [self._windows.count_text_bytes(index) for index in self._indices(number)]
        return None if None in counts else sum(counts)

    def _indices(self, number: int) -> np.ndarray:
        """Returns the indices of the windows of a global batch."""
        return self._order[number * self._batch_size :][: self._batch_size]


class ValidationSet:
    """Documents to validate on, in a fixed order.

    Attributes:
        name: The name of the set; empty for documents held out from the training stores.
        stores: The stores that hold its documents.
        tokenizer: The tokenizer that they were encoded with.
    """

    def __init__(
        self,
        name: str,
        stores: Sequence[TokenStore],
        rows: ShuffledRows | ContiguousRows,
        tokenizer: Tokenizer,
        batch_size: int,
    ):
        """Takes the parts of the set.

        Args:
            name: The name of the set.
            stores: The stores that hold the rows.
            rows: The rows of its batches.
            tokenizer: The tokenizer of the stores.
            batch_size: The number of rows in a global batch.
        """
        self.name = name
        self.stores = stores
        self.tokenizer = tokenizer
        self._rows = rows
        self._batch_size = batch_size
        self._num_bytes: dict[int, int | None] = {}  # By the number of batches.

    def batches(
        self, *, max_batches: int | None = None, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """Yields all documents once.

        In padding, of a last window or a last batch, `targets_mask` is False.

        Args:
            max_batches: The largest number of global batches; None: no limit.
            shard_index: The shard of every global batch to read.
            shard_count: The number of shards of a global batch of `B` rows.

        Returns:
            An iterator over NumPy batches with the `B / shard_count` rows of that shard.

        Raises:
            ValueError: The batch size does not divide into the shards; or, while iterating, a store
                was found to be damaged.
        """
        size = rows_per_shard(self._batch_size, shard_index, shard_count)
        rows = slice(shard_index * size, (shard_index + 1) * size)

        def generate() -> Iterator[Batch]:
            for number in range(self._count_batches(max_batches)):
                batch = self._rows.read(number, rows)
                for store in self.stores:
                    store.check()
                yield batch

        return generate()

    def num_bytes(self, max_batches: int | None = None) -> int | None:
        """Counts the bytes of the target text, for bits per byte.

        Args:
            max_batches: See `batches`.

        Returns:
            The UTF-8 bytes of all targets that count in the loss of these batches, in all shards;
            None if a store of version 1 does not record them.
        """
        count = self._count_batches(max_batches)
        if count not in self._num_bytes:
            counts = [self._rows.count_text_bytes(number) for number in range(count)]
            self._num_bytes[count] = None if None in counts else sum(counts)
        return self._num_bytes[count]

    def _count_batches(self, max_batches: int | None) -> int:
        """Returns the number of global batches, of which there are at most `max_batches`."""
        every = self._rows.num_batches
        return every if max_batches is None else min(every, max_batches)


def open_validation_sets(config: DataConfig, stores: Sequence[TokenStore]) -> list[ValidationSet]:
    """Opens the validation sets of a configuration.

    Args:
        config: The configuration, with the held-out fraction and the stores to validate on.
        stores: The result of `open_stores`; may be empty if `validation_fraction` is 0.

    Returns:
        One set of the documents held out from `stores`, unless `validation_fraction` is 0; then one
        set for each of `validation_stores`, with all of its documents. With `carry_state`, rows
        are `ContiguousRows`.

    Raises:
        ValueError: A store cannot be opened or has another tokenizer, or has too few documents to
            hold one out.
    """
    named = {name: TokenStore.open(path) for name, path in config.validation_paths.items()}
    check_same_tokenizer([*stores, *named.values()])

    def make(name: str, chosen: list[tuple[TokenStore, np.ndarray]]) -> ValidationSet:
        held, tokenizer = [store for store, _ in chosen], chosen[0][0].load_tokenizer()
        if config.carry_state:
            documents = [SelectedDocuments(store, selected) for store, selected in chosen]
            rows = ContiguousRows(documents, tokenizer.bos_id, config)
        else:
            length = config.context_length
            windows = [Windows(*each, length, keep_partial=True) for each in chosen]
            rows = ShuffledRows(ConcatenatedWindows(windows), tokenizer.bos_id, config)
        return ValidationSet(name, held, rows, tokenizer, config.batch_size)

    sets = []
    if config.validation_fraction > 0:
        held_out = [(s, validation_documents(s, config.validation_fraction)) for s in stores]
        sets.append(make(HELD_OUT, held_out))
    for name, store in named.items():
        sets.append(make(name, [(store, np.ones(store.meta.num_documents, bool))]))
    return sets


def stores_of(sets: Iterable[ValidationSet]) -> list[TokenStore]:
    """Returns the stores of some validation sets, perhaps with duplicates."""
    return [store for each in sets for store in each.stores]
