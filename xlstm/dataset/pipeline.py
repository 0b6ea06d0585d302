"""From token stores to batches.

Global batch `g` of a run is a function of the stores, the configuration and `g` alone: whoever
knows the step can go on from there, with any number of processes.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import STDLIB, DataConfig
from xlstm.dataset.stdlib_corpus import open_stdlib_store
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.windows import JoinedWindows, Windows, scatter, split_documents

# Reading a batch takes far less than a step: this hides hiccups of the disk, no more.
_PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# Rows to repeat a store for. Grain has a `repeat` without end, but its length, the largest of
# integers, overflows on being put into batches of one row.
_ENDLESS = 2**52


def open_stores(config: DataConfig, stdlib_dir: str) -> list[TokenStore]:
    """Opens the stores of a configuration.

    Args:
        config: Names the stores.
        stdlib_dir: Where the store of the standard library lies; made there if it does not.

    Returns:
        The stores, in the order of `config.stores`.

    Raises:
        ValueError: A store cannot be opened, or two were written with different tokenizers.
    """
    stores = [
        open_stdlib_store(stdlib_dir) if name == STDLIB else TokenStore.open(name)
        for name in config.stores
    ]
    for store in stores[1:]:
        if store.meta.fingerprint != stores[0].meta.fingerprint:
            raise ValueError(
                f"the token stores {stores[0].path} and {store.path} cannot be mixed: they were "
                f"written with different tokenizers ({stores[0].meta.fingerprint} and "
                f"{store.meta.fingerprint})"
            )
    return stores


def train_batches(
    config: DataConfig,
    stores: Sequence[TokenStore],
    *,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Yields training batches for ever; every epoch of a store is shuffled anew.

    Rows are windows of `T + 1` tokens of one store, without padding. Of each store and epoch, fewer
    than `T` tokens behind the last whole window are not seen.

    Args:
        config: What to read.
        stores: What `open_stores` returned.
        start_step: The global batch to begin with; costs nothing.
        shard_index: Which share of every global batch to read.
        shard_count: Number of shares that a global batch of `B` rows is cut into.

    Returns:
        An iterator over NumPy batches with the `B / shard_count` rows of that share.

    Raises:
        ValueError: The batch cannot be divided, or a store has too little text.
    """
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, but is {start_step}")
    rows = _rows_per_shard(config, shard_index, shard_count)
    sources = _training_windows(config, stores)
    windows, eod_id = JoinedWindows(sources), stores[0].meta.eod_id

    def read(numbers: list[int]) -> Batch:
        return _full_batch(np.stack([windows[number] for number in numbers]), eod_id)

    # The order in pieces of `rows` rows; of every `shard_count` pieces, one is wanted.
    pieces = _training_order(config, sources).batch(rows, batch_fn=list)
    pieces = pieces[start_step * shard_count + shard_index :: shard_count]
    return iter(pieces.map(read).to_iter_dataset(_PREFETCH))


def validation_batches(
    config: DataConfig,
    stores: Sequence[TokenStore],
    *,
    max_batches: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Yields the validation documents of all stores once, in a fixed order.

    The order is scattered over all documents, so that the first few batches are a fair sample.
    Places without a token, in a last window or a last batch, have `targets_mask` False.

    Args:
        config: What to read; its weights and seed play no part.
        stores: What `open_stores` returned.
        max_batches: Stop after so many global batches.
        shard_index: Which share of every global batch to read.
        shard_count: Number of shares that a global batch of `B` rows is cut into.

    Returns:
        An iterator over NumPy batches with the `B / shard_count` rows of that share.

    Raises:
        ValueError: The batch cannot be divided, or no document is set apart for validation.
    """
    rows = _rows_per_shard(config, shard_index, shard_count)
    if config.validation_fraction == 0:
        raise ValueError("there is nothing to validate on: data.validation_fraction is 0")
    sources = [
        Windows(store, validation, config.context_length, keep_partial=True)
        for store, validation in zip(stores, _splits(config, stores), strict=True)
    ]
    windows, eod_id = JoinedWindows(sources), stores[0].meta.eod_id
    order = np.argsort(scatter(len(windows)), kind="stable").tolist()
    num_batches = -(-len(windows) // config.batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    shape = (rows, config.context_length + 1)

    def generate() -> Iterator[Batch]:
        for step in range(num_batches):
            first = step * config.batch_size + shard_index * rows
            chosen = [windows[number] for number in order[first : first + rows]]
            yield _padded_batch(chosen, shape, eod_id)

    return generate()


def _rows_per_shard(config: DataConfig, shard_index: int, shard_count: int) -> int:
    """Returns `B / shard_count`."""
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} is not one of the {shard_count} shares")
    rows, rest = divmod(config.batch_size, shard_count)
    if rest:
        raise ValueError(
            f"data.batch_size={config.batch_size} does not divide into {shard_count} shares: "
            f"choose a multiple of {shard_count}"
        )
    return rows


def _splits(config: DataConfig, stores: Sequence[TokenStore]) -> list[np.ndarray]:
    """Returns for each store which documents are for validation."""
    splits = []
    for store in stores:
        try:
            splits.append(split_documents(store.meta.num_documents, config.validation_fraction))
        except ValueError as error:
            raise ValueError(f"token store {store.path}: {error}") from error
    return splits


def _training_windows(config: DataConfig, stores: Sequence[TokenStore]) -> list[Windows]:
    """Returns the training windows of each store; those it trains on are not empty."""
    windows = [
        Windows(store, ~validation, config.context_length)
        for store, validation in zip(stores, _splits(config, stores), strict=True)
    ]
    weights = config.weights or [1.0] * len(stores)
    for store, source, weight in zip(stores, windows, weights, strict=True):
        if weight and not len(source):
            raise ValueError(
                f"token store {store.path} has {source.num_tokens} tokens to train on, fewer than "
                f"the {config.context_length + 1} of one row: shorten data.context_length, or add "
                "text"
            )
    return windows


def _training_order(config: DataConfig, sources: Sequence[Windows]) -> grain.MapDataset:
    """Returns the endless sequence of the numbers, in `JoinedWindows`, of the training rows.

    Grain orders the numbers and not the windows themselves: it keeps statistics of every element
    that it reads, which would cost several times the reading.
    """
    weights = config.weights or [source.num_tokens for source in sources]
    orders, kept, first = [], [], 0
    for place, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        if weight:
            # Not `seed` itself: Grain counts it up each epoch, so that neighbours share orders.
            seed = int(np.random.SeedSequence([config.seed, place]).generate_state(1)[0])
            numbers = grain.MapDataset.range(first, first + len(source))
            orders.append(numbers.shuffle(seed=seed).repeat(_ENDLESS // len(source) + 1))
            kept.append(weight)
        first += len(source)
    return grain.MapDataset.mix(orders, kept)


def _full_batch(windows: np.ndarray, eod_id: int) -> Batch:
    """Turns full windows `(B, T + 1)` into a batch."""
    inputs = np.ascontiguousarray(windows[:, :-1])
    return Batch(
        inputs=inputs,
        targets=np.ascontiguousarray(windows[:, 1:]),
        targets_mask=np.ones(inputs.shape, bool),
        reset=inputs == eod_id,
    )


def _padded_batch(windows: list[np.ndarray], shape: tuple[int, int], eod_id: int) -> Batch:
    """Turns windows, some perhaps short or missing, into a batch of windows of `shape`."""
    padded = np.full(shape, eod_id, np.int32)
    present = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        padded[row, : window.size] = window
        present[row, : window.size] = True
    return _full_batch(padded, eod_id).replace(targets_mask=present[:, 1:])
