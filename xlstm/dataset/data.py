"""What a run reads: token stores, or a task."""

from collections.abc import Iterator

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.store_data import RowOrigin, batch_origins, open_stores, train_batches
from xlstm.dataset.store_meta import TOKENS_FILE
from xlstm.dataset.task_data import TaskData
from xlstm.dataset.validation import ValidationSet, open_validation_sets


class StoreData:
    """Token stores.

    Attributes:
        stores: The stores that are trained on.
        tokenizer: What they were encoded with.
        checksums: By which a run knows its data again.
    """

    def __init__(self, config: DataConfig, stdlib_dir: str):
        """Opens the stores; see `open_stores`, as for what is raised."""
        self._config, self.stores = config, open_stores(config, stdlib_dir)
        self.tokenizer = self.stores[0].load_tokenizer()
        self.checksums = [store.meta.files[TOKENS_FILE]["sha256"] for store in self.stores]

    def train_batches(
        self, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """See `train_batches` of the pipeline."""
        return train_batches(
            self._config,
            self.stores,
            start_step=start_step,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    def batch_origins(self, step: int) -> list[RowOrigin]:
        """See `batch_origins` of the pipeline."""
        return batch_origins(self._config, self.stores, step)

    def validation_sets(self) -> list[ValidationSet]:
        """See `open_validation_sets`."""
        return open_validation_sets(self._config, self.stores)


Data = StoreData | TaskData


def open_data(config: DataConfig, stdlib_dir: str) -> Data:
    """Opens what a run reads.

    Args:
        config: Names stores or a task.
        stdlib_dir: Where the store of the standard library lies; made there if it does not.

    Raises:
        ValueError: If a store cannot be opened, stores do not fit each other, or there is no such
            task.
    """
    return TaskData(config) if config.task else StoreData(config, stdlib_dir)
