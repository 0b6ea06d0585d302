"""Training batches from token stores.

Global batch `g` of a run depends only on the stores, the configuration and `g`. So a run resumes
from its step alone, with any number of processes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from xlstm.dataset.batch import Batch, Phase, full_batch, remaining_phases, rows_per_shard
from xlstm.dataset.config import STDLIB, DataConfig
from xlstm.dataset.permutation import shuffled_index
from xlstm.dataset.stdlib_corpus import open_stdlib_store
from xlstm.dataset.token_store import TokenStore, check_same_tokenizer
from xlstm.dataset.windows import ConcatenatedWindows, Windows, validation_documents

# Reading a batch takes far less time than a step, so this only hides delays of the disk.
_PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# The length of endless sequences of rows. Grain's own endless `repeat` has the largest integer as
# its length, which overflows in batches of one row.
ENDLESS = 2**52


@dataclasses.dataclass(frozen=True)
class RowOrigin:
    """The origin of a row of a training batch.

    Attributes:
        store: The path of the token store.
        first_document: The index, in the store, of the document that the row starts in.
        last_document: The index of the document that it ends in. Held-out documents between the
            two are not in the row.
    """

    store: str
    first_document: int
    last_document: int


def open_stores(config: DataConfig, stdlib_dir: str) -> list[TokenStore]:
    """Opens the stores of a configuration.

    Args:
        config: The configuration, which names the stores.
        stdlib_dir: The folder of the standard library's store, which is built if it is missing.

    Returns:
        The stores, in the order of `config.stores`.

    Raises:
        ValueError: A store cannot be opened, or two have different tokenizers.
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
    """Yields training batches without end.

    Rows are windows of `T + 1` tokens of one store, without padding. In each epoch of a store,
    fewer than `T` tokens after the last full window are unused. Batches are consecutive pieces of
    one sequence of rows, even where the batch size changes (see `batch.remaining_phases`).

    Each epoch of a store has a new order, unless `data.shuffle` is "contiguous". Then row `r` of
    each batch continues row `r` of the previous batch: its first input is the last target there,
    or the first token of a document, where `reset` is True. The `W` windows of all stores form a
    ring, in which row `r` of batch `g` is window `(r * W // B + g) % W`. So any `W` consecutive
    batches have each window `B` times, once in each row.

    Args:
        config: The configuration.
        stores: The result of `open_stores`.
        start_step: The first global batch; starting late costs nothing.
        shard_index: The shard of every global batch to read.
        shard_count: The number of shards of a global batch of `B` rows.

    Returns:
        An iterator over NumPy batches with the `B / shard_count` rows of that shard.

    Raises:
        ValueError: The step is negative, a later batch size does not divide into the shards, or a
            store has too little text; or, while iterating, a store was found to be damaged.
    """
    sources = _training_windows(config, stores)
    windows, bos_id = ConcatenatedWindows(sources), stores[0].meta.bos_id
    order = _training_order(config, sources)

    def read(indices: list[int]) -> Batch:
        return full_batch(np.stack([windows[index] for index in indices]), bos_id)

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
    """Reads rows in batches of the configured sizes.

    Args:
        config: The configuration, with the batch sizes.
        order: The endless sequence of row indices.
        read: Returns the batch of the rows with some indices.
        start_step: The first global batch.
        shard_index: The shard of every global batch to read.
        shard_count: The number of shards.

    Returns:
        An iterator over that shard of the global batches.

    Raises:
        ValueError: See `train_batches`.
    """
    phases = remaining_phases(config, start_step)
    shard_rows = [rows_per_shard(phase.batch_size, shard_index, shard_count) for phase in phases]

    def read_phase(phase: Phase, rows: int) -> grain.IterDataset:
        # Split the order into pieces of `rows` rows, and take one of every `shard_count` pieces.
        pieces = order[phase.first_row :].batch(rows, batch_fn=list)[shard_index::shard_count]
        return pieces[: phase.num_steps].map(read).to_iter_dataset(_PREFETCH)

    return itertools.chain.from_iterable(map(read_phase, phases, shard_rows))


def batch_origins(config: DataConfig, stores: Sequence[TokenStore], step: int) -> list[RowOrigin]:
    """Returns where the rows of a training batch come from.

    Args:
        config: The configuration.
        stores: The result of `open_stores`.
        step: The index of the global batch.

    Returns:
        The origin of each row of the global batch, in order.

    Raises:
        ValueError: The step is negative, or a store has too little text.
    """
    phase = remaining_phases(config, step)[0]
    sources = _training_windows(config, stores)
    windows, order = ConcatenatedWindows(sources), _training_order(config, sources)
    origins = []
    for row in range(phase.first_row, phase.first_row + phase.batch_size):
        part, index = windows.locate(order[row])
        origins.append(RowOrigin(stores[part].path, *sources[part].document_range(index)))
    return origins


def _training_windows(config: DataConfig, stores: Sequence[TokenStore]) -> list[Windows]:
    """Returns the training windows of each store; raises ValueError if a used store has none."""
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
                f"token store {store.path} has {source.num_tokens} tokens to train on: expected "
                f"at least the {config.context_length + 1} of one row; reduce data.context_length,"
                " or add text"
            )
    return windows


def _training_order(config: DataConfig, sources: Sequence[Windows]) -> grain.MapDataset:
    """Returns the endless sequence of the indices, in `ConcatenatedWindows`, of training rows.

    Grain shuffles indices rather than windows because it keeps statistics of every element that it
    reads. For windows, these would cost several times as much as reading.
    """
    if config.shuffle == "contiguous":
        return _contiguous_order(sum(map(len, sources)), config.batch_size)
    weights = config.weights or [source.num_tokens for source in sources]
    orders, kept, first = [], [], 0
    for position, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        if weight:
            # Each store has its own seed.
            seed = int(np.random.SeedSequence([config.seed, position]).generate_state(1)[0])
            orders.append(_ORDERS[config.shuffle](first, len(source), seed))
            kept.append(weight)
        first += len(source)
    return grain.MapDataset.mix(orders, kept)


def _permutation_order(first: int, length: int, seed: int) -> grain.MapDataset:
    """Returns an endless shuffled order of the `length` indices from `first` on, for each epoch."""
    positions = grain.MapDataset.range(ENDLESS)
    return positions.map(lambda position: first + shuffled_index(position, length, seed))


def _grain_order(first: int, length: int, seed: int) -> grain.MapDataset:
    """Returns the shuffled order of older runs, in which an epoch may lack an index.

    At lengths 4^k + 1 from 65,537 on, the last index never occurs (Grain 0.2.18).
    """
    # Grain increments the seed each epoch. With the seed of the configuration, consecutive seeds
    # would share their orders.
    indices = grain.MapDataset.range(first, first + length)
    return indices.shuffle(seed=seed).repeat(ENDLESS // length + 1)


def _contiguous_order(length: int, batch_size: int) -> grain.MapDataset:
    """Returns an endless order in which each row of a batch goes through all `length` indices."""

    def index_at(position: int) -> int:
        step, row = divmod(position, batch_size)
        return (row * length // batch_size + step) % length

    return grain.MapDataset.range(ENDLESS).map(index_at)


_ORDERS = {"permutation": _permutation_order, "grain": _grain_order}
