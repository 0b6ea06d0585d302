"""From token stores to batches.

Global batch `g` of a run is a function of the stores, the configuration and `g` alone: whoever
knows the step can go on from there, with any number of processes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from xlstm.dataset.batch import Batch, Phase, full_batch, phases_from, rows_per_shard
from xlstm.dataset.config import STDLIB, DataConfig
from xlstm.dataset.permutation import shuffled
from xlstm.dataset.stdlib_corpus import open_stdlib_store
from xlstm.dataset.token_store import TokenStore, check_same_tokenizer
from xlstm.dataset.windows import JoinedWindows, Windows, validation_documents

# Reading a batch takes far less than a step: this hides hiccups of the disk, no more.
_PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# Rows to repeat a store for. Grain has a `repeat` without end, but its length, the largest of
# integers, overflows on being put into batches of one row.
ENDLESS = 2**52


@dataclasses.dataclass(frozen=True)
class RowOrigin:
    """Where a row of a training batch comes from.

    Attributes:
        store: The path of the token store.
        first_document: The number, in the store, of the document that the row begins in.
        last_document: The number of the document that it ends in. Documents between the two that
            are kept for validation are not in the row.
    """

    store: str
    first_document: int
    last_document: int


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
    check_same_tokenizer(stores)
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
    than `T` tokens behind the last whole window are not seen. Where the batches grow, see
    `batch_sizes`, each begins with the row behind the last of the one before all the same.

    Args:
        config: What to read.
        stores: What `open_stores` returned.
        start_step: The global batch to begin with; costs nothing.
        shard_index: Which share of every global batch to read.
        shard_count: Number of shares that a global batch of `B` rows is cut into.

    Returns:
        An iterator over NumPy batches with the `B / shard_count` rows of that share.

    Raises:
        ValueError: The step is negative, a batch from there on cannot be divided, or a store has
            too little text; or, later, a store was found to be damaged.
    """
    sources = _training_windows(config, stores)
    windows, bos_id = JoinedWindows(sources), stores[0].meta.bos_id
    order = _training_order(config, sources)

    def read(numbers: list[int]) -> Batch:
        return full_batch(np.stack([windows[number] for number in numbers]), bos_id)

    batches = read_batches(config, order, read, start_step, shard_index, shard_count)

    def checked() -> Iterator[Batch]:
        for batch in batches:
            for store in stores:
                store.check()
            yield batch

    return checked()


def read_batches(
    config: DataConfig,
    order: grain.MapDataset,
    read: Callable[[list[int]], Batch],
    start_step: int,
    shard_index: int,
    shard_count: int,
) -> Iterator[Batch]:
    """Reads rows in batches of the sizes that the configuration wants.

    Args:
        config: Has the sizes.
        order: The endless sequence of the numbers of the rows.
        read: Makes a batch of the rows of some numbers.
        start_step: See `train_batches`, as for the others and for what is raised.
        shard_index: Which share of every global batch to read.
        shard_count: Number of shares.

    Returns:
        An iterator over that share of the global batches.
    """
    phases = phases_from(config, start_step)
    shares = [rows_per_shard(phase.batch_size, shard_index, shard_count) for phase in phases]

    def read_phase(phase: Phase, rows: int) -> grain.IterDataset:
        # The order in pieces of `rows` rows; of every `shard_count` pieces, one is wanted.
        pieces = order[phase.first_row :].batch(rows, batch_fn=list)[shard_index::shard_count]
        return pieces[: phase.num_steps].map(read).to_iter_dataset(_PREFETCH)

    return itertools.chain.from_iterable(map(read_phase, phases, shares))


def batch_origins(config: DataConfig, stores: Sequence[TokenStore], step: int) -> list[RowOrigin]:
    """Says where the rows of a training batch come from.

    Args:
        config: What to read.
        stores: What `open_stores` returned.
        step: The global batch.

    Returns:
        The origin of each row, in the order of the rows of all shares.

    Raises:
        ValueError: The step is negative, or a store has too little text.
    """
    phase = phases_from(config, step)[0]
    sources = _training_windows(config, stores)
    windows, order = JoinedWindows(sources), _training_order(config, sources)
    origins = []
    for row in range(phase.first_row, phase.first_row + phase.batch_size):
        part, index = windows.locate(order[row])
        origins.append(RowOrigin(stores[part].path, *sources[part].documents(index)))
    return origins


def _training_windows(config: DataConfig, stores: Sequence[TokenStore]) -> list[Windows]:
    """Returns the training windows of each store; those it trains on are not empty."""
    windows = [
        Windows(
            store, ~validation_documents(store, config.validation_fraction), config.context_length
        )
        for store in stores
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
            # A seed of each store's own.
            seed = int(np.random.SeedSequence([config.seed, place]).generate_state(1)[0])
            orders.append(_ORDERS[config.shuffle](first, len(source), seed))
            kept.append(weight)
        first += len(source)
    return grain.MapDataset.mix(orders, kept)


def _permutation_order(first: int, length: int, seed: int) -> grain.MapDataset:
    """Returns the numbers from `first` on in an endless order, each once an epoch."""
    positions = grain.MapDataset.range(ENDLESS)
    return positions.map(lambda position: first + shuffled(position, length, seed))


def _grain_order(first: int, length: int, seed: int) -> grain.MapDataset:
    """Returns the same as runs had it before: not every number once an epoch at every length.

    At lengths 4^k + 1 from 65,537 on the last number never comes (Grain 0.2.18).
    """
    # Grain counts the seed up each epoch: it must not be that of the configuration, or the orders
    # of neighbouring seeds would be the same.
    numbers = grain.MapDataset.range(first, first + length)
    return numbers.shuffle(seed=seed).repeat(ENDLESS // length + 1)


_ORDERS = {"permutation": _permutation_order, "grain": _grain_order}
