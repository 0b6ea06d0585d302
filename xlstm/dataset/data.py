"""The data of a run: token stores, or a synthetic task."""

from collections.abc import Iterator

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.store_data import RowOrigin, batch_origins, open_stores, train_batches
from xlstm.dataset.store_meta import TOKENS_FILE
from xlstm.dataset.task_data import TaskData
from xlstm.dataset.validation import ValidationSet, open_validation_sets


class StoreData:
    """Token stores as the data of a run.

    Attributes:
        stores: The stores to train on.
        tokenizer: The tokenizer that they were encoded with.
        checksums: The SHA-256 of each store's tokens, by which a run recognizes its data.
    """

    def __init__(self, config: DataConfig, stdlib_dir: str):
        """Opens the stores; see `open_stores` for arguments and errors."""
        self._config, self.stores = config, open_stores(config, stdlib_dir)
        self.tokenizer = self.stores[0].load_tokenizer()
        self.checksums = [store.meta.files[TOKENS_FILE]["sha256"] for store in self.stores]

    def train_batches(
        self, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """Yields training batches; see `store_data.train_batches`."""
        return train_batches(
            self._config,
            self.stores,
            start_step=start_step,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    def batch_origins(self, step: int) -> list[RowOrigin]:
        """Returns where the rows of a batch come from; see `store_data.batch_origins`."""
        return batch_origins(self._config, self.stores, step)

    def validation_sets(self) -> list[ValidationSet]:
        """Opens the validation sets; see `validation.open_validation_sets`."""
        return open_validation_sets(self._config, self.stores)


Data = StoreData | TaskData


def open_data(config: DataConfig, stdlib_dir: str) -> Data:
    """Opens the data of a run.

    Args:
        config: The configuration, which names stores or a task.
        stdlib_dir: The folder of the standard library's store, which is built if it is missing.

    Returns:
        The stores, or the task.

    Raises:
        ValueError: A store cannot be opened, two stores have different tokenizers, or the task is
            unknown.
    """
    return TaskData(config) if config.task else StoreData(config, stdlib_dir)
