"""Batches of synthetic tasks, whose examples are generated when they are read.

A row depends only on the seed and the row's index. So a run resumes from its step alone, with any
number of processes. A row holds as many examples of random lengths as fit, in sequence. No example
is truncated; the rest of the row is padding, which does not count in the loss.
"""

import json
from collections.abc import Iterator

import grain
import numpy as np
import tokenizers

from xlstm.dataset.batch import Batch, remaining_phases, rows_per_shard
from xlstm.dataset.config import DataConfig
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.store_data import ENDLESS, RowOrigin, read_batches
from xlstm.dataset.tasks import EOD_ID, EOD_WORD, Task, create_task
from xlstm.dataset.tokenizer import Tokenizer

_VALIDATION_ROWS = 512  # Of each set.
_TRAINING, _VALIDATION = 0, 1  # Streams of random numbers.


class TaskRows:
    """Rows of examples whose lengths are drawn from a range."""

    def __init__(self, task: Task, lengths: tuple[int, int], width: int, seed: tuple[int, ...]):
        """Sets the rows up.

        Args:
            task: The task.
            lengths: The shortest and longest length of an example.
            width: The number of tokens in a row.
            seed: The seed of all rows.

        Raises:
            ValueError: The longest example does not fit into a row.
        """
        if task.num_tokens(lengths[1]) > width:
            raise ValueError(
                f"an example of {task.name} of length {lengths[1]} has"
                f" {task.num_tokens(lengths[1])} tokens: expected at most the {width} of a row,"
                " data.context_length + 1"
            )
        self._task, self._lengths, self._width, self._seed = task, lengths, width, seed

    def batch(self, indices: list[int]) -> Batch:
        """Returns the rows with some indices, `(len(indices), width - 1)`."""
        ids, is_answer = (np.stack(x) for x in zip(*map(self._row, indices), strict=True))
        inputs = np.ascontiguousarray(ids[:, :-1])
        targets, mask = (np.ascontiguousarray(x[:, 1:]) for x in (ids, is_answer))
        return Batch(inputs, targets, mask, reset=inputs == EOD_ID)

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([*self._seed, index])
        ids, is_answer = np.full(self._width, EOD_ID, np.int32), np.zeros(self._width, bool)
        filled, (shortest, longest) = 0, self._lengths
        while True:
            length = int(rng.integers(shortest, longest + 1))
            stop = filled + self._task.num_tokens(length)
            if stop > self._width:
                return ids, is_answer
            ids[filled:stop], is_answer[filled:stop] = self._task.make_example(rng, length)
            filled = stop


class TaskValidationSet:
    """A fixed set of examples to validate on, with the interface of `ValidationSet`."""

    stores = ()

    def __init__(self, name: str, rows: TaskRows, tokenizer: Tokenizer, batch_size: int):
        """Takes the name of the set, its rows, their tokenizer and the size of a batch."""
        self.name, self.tokenizer = name, tokenizer
        self._rows, self._batch_size = rows, batch_size

    def batches(
        self, *, max_batches: int | None = None, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """Yields the examples once; see `ValidationSet.batches`."""
        rows = rows_per_shard(self._batch_size, shard_index, shard_count)
        num_batches = -(-_VALIDATION_ROWS // self._batch_size)
        for number in range(min(num_batches, max_batches or num_batches)):
            first = number * self._batch_size + shard_index * rows
            yield self._rows.batch(list(range(first, first + rows)))

    def num_bytes(self, max_batches: int | None = None) -> None:
        """Returns None: answers are not text, so bits per byte are undefined."""


class TaskData:
    """A synthetic task as the data of a run, with the interface of `StoreData`."""

    stores = ()

    def __init__(self, config: DataConfig):
        """Creates the task of a configuration.

        Raises:
            ValueError: The task is unknown, or its lengths are impossible.
        """
        self._config, self._task = config, create_task(config.task)
        self.tokenizer = _tokenizer_of(self._task)
        self.checksums = [f"task {self._task.name}"]
        self._rows = self._rows_of(config.task_lengths, config.context_length, _TRAINING)

    def train_batches(
        self, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """Yields training batches; see `store_data.train_batches`."""
        order = grain.MapDataset.range(ENDLESS)
        read = self._rows.batch
        return read_batches(self._config, order, read, start_step, shard_index, shard_count)

    def batch_origins(self, step: int) -> list[RowOrigin]:
        """Returns where the rows of a batch come from: the task, and row indices as documents."""
        phase = remaining_phases(self._config, step)[0]
        rows = range(phase.first_row, phase.first_row + phase.batch_size)
        return [RowOrigin(self.checksums[0], row, row) for row in rows]

    def validation_sets(self) -> list[TaskValidationSet]:
        """Returns a set for each of `validation_lengths`; its rows are multiples of the context."""
        sets = []
        for text, lengths in self._config.validation_ranges.items():
            tokens, context = self._task.num_tokens(lengths[1]), self._config.context_length
            rows = self._rows_of(lengths, -(-(tokens - 1) // context) * context, _VALIDATION)
            name = f"lengths_{text.replace('-', '_')}"
            sets.append(TaskValidationSet(name, rows, self.tokenizer, self._config.batch_size))
        return sets

    def _rows_of(self, lengths: tuple[int, int], context_length: int, stream: int) -> TaskRows:
        longest = self._task.max_length
        if longest is not None and lengths[1] > longest:
            raise ValueError(
                f"data.task={self._task.name!r} has examples of lengths up to {longest}, not"
                f" {lengths[1]}: give a larger size after a colon, or shorter lengths"
            )
        seed = (self._config.seed if stream == _TRAINING else 0, stream)
        return TaskRows(self._task, lengths, context_length + 1, seed)


def _tokenizer_of(task: Task) -> Tokenizer:
    """Returns a tokenizer of the words of a task, separated by spaces."""
    vocabulary = {word: token_id for token_id, word in enumerate(task.words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=EOD_WORD))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    definition = json.dumps(json.loads(inner.to_str()), indent=1, sort_keys=True)
    return JsonTokenizer(definition.encode(), f"task {task.name}", EOD_WORD)
