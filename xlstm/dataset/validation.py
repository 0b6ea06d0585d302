"""Validation sets from token stores."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from xlstm.dataset.batch import Batch, padded_batch, rows_per_shard
from xlstm.dataset.config import DataConfig
from xlstm.dataset.permutation import hashed_order
from xlstm.dataset.token_store import TokenStore, check_same_tokenizer
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.dataset.windows import ConcatenatedWindows, Windows, validation_documents

HELD_OUT = ""  # The name of the set of documents held out from the training stores.


class ValidationSet:
    """Documents to validate on, in a fixed order.

    The order is pseudorandom, so that the first few batches are a fair sample. It depends neither
    on the seed of the run nor on the weights of its stores.

    Attributes:
        name: The name of the set; empty for documents held out from the training stores.
        stores: The stores that hold its documents.
        tokenizer: The tokenizer that they were encoded with.
    """

    def __init__(
        self,
        name: str,
        stores: Sequence[TokenStore],
        windows: ConcatenatedWindows,
        tokenizer: Tokenizer,
        config: DataConfig,
    ):
        """Computes the order, without reading any token.

        Args:
            name: The name of the set.
            stores: The stores that hold the rows.
            windows: The rows, of `data.context_length + 1` tokens or, at the end of a store, fewer.
            tokenizer: The tokenizer of the stores.
            config: The configuration, with the context length and the batch size.
        """
        self.name = name
        self.stores = stores
        self._windows = windows
        self.tokenizer = tokenizer
        self._batch_size = config.batch_size
        self._width = config.context_length + 1
        self._order = hashed_order(len(windows))
        self._num_bytes: dict[int, int | None] = {}  # By the number of rows.

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
        rows = rows_per_shard(self._batch_size, shard_index, shard_count)
        indices, bos_id = self._indices(max_batches), self.tokenizer.bos_id

        def generate() -> Iterator[Batch]:
            for first in range(0, indices.size, self._batch_size):
                shard = indices[first + shard_index * rows :][:rows]
                windows = [self._windows[index] for index in shard]
                for store in self.stores:
                    store.check()
                yield padded_batch(windows, (rows, self._width), bos_id)

        return generate()

    def num_bytes(self, max_batches: int | None = None) -> int | None:
        """Counts the bytes of the target text, for bits per byte.

        Args:
            max_batches: See `batches`.

        Returns:
            The UTF-8 bytes of all targets that count in the loss of these batches, in all shards;
            None if a store of version 1 does not record them.
        """
        indices = self._indices(max_batches)
        if indices.size not in self._num_bytes:
            counts = [self._windows.count_text_bytes(index) for index in indices]
            self._num_bytes[indices.size] = None if None in counts else sum(counts)
        return self._num_bytes[indices.size]

    def _indices(self, max_batches: int | None) -> np.ndarray:
        """Returns the indices of the windows in the first batches, in order."""
        if max_batches is None:
            return self._order
        return self._order[: max_batches * self._batch_size]


def open_validation_sets(config: DataConfig, stores: Sequence[TokenStore]) -> list[ValidationSet]:
    """Opens the validation sets of a configuration.

    Args:
        config: The configuration, with the held-out fraction and the stores to validate on.
        stores: The result of `open_stores`; may be empty if `validation_fraction` is 0.

    Returns:
        One set of the documents held out from `stores`, unless `validation_fraction` is 0; then one
        set for each of `validation_stores`, with all of its documents.

    Raises:
        ValueError: A store cannot be opened or has another tokenizer, or has too few documents to
            hold one out.
    """
    named = {name: TokenStore.open(path) for name, path in config.validation_paths.items()}
    check_same_tokenizer([*stores, *named.values()])

    def make(name: str, chosen: list[tuple[TokenStore, np.ndarray]]) -> ValidationSet:
        parts = [
            Windows(store, documents, config.context_length, keep_partial=True)
            for store, documents in chosen
        ]
        windows, tokenizer = ConcatenatedWindows(parts), chosen[0][0].load_tokenizer()
        return ValidationSet(name, [store for store, _ in chosen], windows, tokenizer, config)

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
