"""The sets that a run validates on."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from xlstm.dataset.batch import Batch, padded_batch, rows_per_shard
from xlstm.dataset.config import DataConfig
from xlstm.dataset.token_store import TokenStore, check_same_tokenizer
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.dataset.windows import JoinedWindows, Windows, scatter, validation_documents

HELD_OUT = ""  # The name of the set that is held out of the training stores.


class ValidationSet:
    """Documents to validate on, always in the same order.

    The order is scattered over all documents, so that the first few batches are a fair sample.
    Neither the seed of a run nor the weights of its stores play a part.

    Attributes:
        name: Tells the set from the others; empty for the one held out of the training stores.
        stores: What its documents lie in.
        tokenizer: What its documents were encoded with.
    """

    def __init__(
        self,
        name: str,
        stores: Sequence[TokenStore],
        windows: JoinedWindows,
        tokenizer: Tokenizer,
        config: DataConfig,
    ):
        """Finds the order, without reading any token.

        Args:
            name: The set's name.
            stores: What the rows lie in.
            windows: The rows, `data.context_length + 1` tokens or, at ends, fewer.
            tokenizer: What they were encoded with.
            config: Has the context length and the batch size.
        """
        self.name = name
        self.stores = stores
        self._windows = windows
        self.tokenizer = tokenizer
        self._batch_size = config.batch_size
        self._width = config.context_length + 1
        self._order = np.argsort(scatter(len(windows)), kind="stable")
        self._num_bytes: dict[int, int | None] = {}  # By the number of rows.

    def batches(
        self, *, max_batches: int | None = None, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """Yields the documents once.

        Places without a token, in a last window or a last batch, have `targets_mask` False.

        Args:
            max_batches: Stop after so many global batches.
            shard_index: Which share of every global batch to read.
            shard_count: Number of shares that a global batch of `B` rows is cut into.

        Returns:
            An iterator over NumPy batches with the `B / shard_count` rows of that share.

        Raises:
            ValueError: The batch cannot be divided; or, later, a store was found to be damaged.
        """
        rows = rows_per_shard(self._batch_size, shard_index, shard_count)
        numbers, bos_id = self._numbers(max_batches), self.tokenizer.bos_id

        def generate() -> Iterator[Batch]:
            for first in range(0, numbers.size, self._batch_size):
                share = numbers[first + shard_index * rows :][:rows]
                chosen = [self._windows[number] for number in share]
                for store in self.stores:
                    store.check()
                yield padded_batch(chosen, (rows, self._width), bos_id)

        return generate()

    def num_bytes(self, max_batches: int | None = None) -> int | None:
        """Counts the text that the loss is about, for bits per byte.

        Args:
            max_batches: As for `batches`.

        Returns:
            The UTF-8 bytes of all targets that count in these batches, in all shares; None if a
            store, which must then be of version 1, does not tell.
        """
        numbers = self._numbers(max_batches)
        if numbers.size not in self._num_bytes:
            counts = [self._windows.count_text_bytes(number) for number in numbers]
            self._num_bytes[numbers.size] = None if None in counts else sum(counts)
        return self._num_bytes[numbers.size]

    def _numbers(self, max_batches: int | None) -> np.ndarray:
        """Returns the numbers of the windows in the first batches, in order."""
        if max_batches is None:
            return self._order
        return self._order[: max_batches * self._batch_size]


def open_validation_sets(config: DataConfig, stores: Sequence[TokenStore]) -> list[ValidationSet]:
    """Opens everything that a run validates on.

    Args:
        config: Says what is held out of the training stores, and names stores to validate on.
        stores: What `open_stores` returned; none will do where nothing is held out.

    Returns:
        The documents held out of `stores`, as one set, unless `validation_fraction` is 0; then
        each of `validation_stores`, all of its documents.

    Raises:
        ValueError: A store cannot be opened or was written with another tokenizer, or of so few
            documents none can be held out.
    """
    named = {name: TokenStore.open(path) for name, path in config.validation_paths.items()}
    check_same_tokenizer([*stores, *named.values()])

    def make(name: str, chosen: list[tuple[TokenStore, np.ndarray]]) -> ValidationSet:
        parts = [
            Windows(store, documents, config.context_length, keep_partial=True)
            for store, documents in chosen
        ]
        windows, tokenizer = JoinedWindows(parts), chosen[0][0].load_tokenizer()
        return ValidationSet(name, [store for store, _ in chosen], windows, tokenizer, config)

    sets = []
    if config.validation_fraction > 0:
        held_out = [(s, validation_documents(s, config.validation_fraction)) for s in stores]
        sets.append(make(HELD_OUT, held_out))
    for name, store in named.items():
        sets.append(make(name, [(store, np.ones(store.meta.num_documents, bool))]))
    return sets


def stores_of(sets: Iterable[ValidationSet]) -> list[TokenStore]:
    """Returns the stores that the rows of some sets lie in; one may come twice."""
    return [store for each in sets for store in each.stores]
