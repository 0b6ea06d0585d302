"""From tasks to batches: rows of examples that are made when they are read.

A row is a function of the seed and its number alone, so that whoever knows the step can go on from
there, with any number of processes. It holds as many examples of random lengths as fit, one behind
the other; none is cut, and what is left is padding that does not count.
"""

import json
from collections.abc import Iterator

import grain
import numpy as np
import tokenizers

from xlstm.dataset.batch import Batch, phases_from, rows_per_shard
from xlstm.dataset.config import DataConfig
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.store_data import ENDLESS, RowOrigin, read_batches
from xlstm.dataset.tasks import EOD_ID, EOD_WORD, Task, create_task
from xlstm.dataset.tokenizer import Tokenizer

_VALIDATION_ROWS = 512  # Of each set.
_TRAINING, _VALIDATION = 0, 1  # Streams of random numbers.


class TaskRows:
    """Rows of examples of lengths from a range."""

    def __init__(self, task: Task, lengths: tuple[int, int], width: int, seed: tuple[int, ...]):
        """Takes a task, the range with its ends, tokens of a row, and what the numbers depend on.

        Raises:
            ValueError: If the longest example does not fit into a row.
        """
        if task.num_tokens(lengths[1]) > width:
            raise ValueError(
                f"an example of {task.name} of length {lengths[1]} has"
                f" {task.num_tokens(lengths[1])} tokens, more than the {width} of a row of"
                " data.context_length + 1"
            )
        self._task, self._lengths, self._width, self._seed = task, lengths, width, seed

    def batch(self, numbers: list[int]) -> Batch:
        """The rows of some numbers, `(len(numbers), width - 1)`."""
        ids, is_answer = (np.stack(x) for x in zip(*map(self._row, numbers), strict=True))
        inputs = np.ascontiguousarray(ids[:, :-1])
        targets, mask = (np.ascontiguousarray(x[:, 1:]) for x in (ids, is_answer))
        return Batch(inputs, targets, mask, reset=inputs == EOD_ID)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([*self._seed, number])
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
    """Examples to validate on, always the same; see `ValidationSet`."""

    stores = ()

    def __init__(self, name: str, rows: TaskRows, tokenizer: Tokenizer, batch_size: int):
        """Takes the set's name, its rows, their tokenizer and the rows of a batch."""
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
        """Answers are no text: there is nothing to count."""


class TaskData:
    """What a run on a task reads; see `StoreData`."""

    stores = ()

    def __init__(self, config: DataConfig):
        """Makes the task.

        Raises:
            ValueError: If the configuration names no task that there is, or lengths that cannot be.
        """
        self._config, self._task = config, create_task(config.task)
        self.tokenizer = _tokenizer_of(self._task)
        self.checksums = [f"task {self._task.name}"]
        self._rows = self._rows_of(config.task_lengths, config.context_length, _TRAINING)

    def train_batches(
        self, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> Iterator[Batch]:
        """See `train_batches` of the pipeline."""
        order = grain.MapDataset.range(ENDLESS)
        read = self._rows.batch
        return read_batches(self._config, order, read, start_step, shard_index, shard_count)

    def batch_origins(self, step: int) -> list[RowOrigin]:
        """See `batch_origins` of the pipeline; the documents are the numbers of the rows."""
        phase = phases_from(self._config, step)[0]
        rows = range(phase.first_row, phase.first_row + phase.batch_size)
        return [RowOrigin(self.checksums[0], row, row) for row in rows]

    def validation_sets(self) -> list[TaskValidationSet]:
        """A set for each of `validation_lengths`, in rows of a multiple of `context_length`."""
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
                f"{self._task.name} has examples of lengths up to {longest}, not {lengths[1]}: give"
                " it a larger size behind a colon, or shorter lengths"
            )
        seed = (self._config.seed if stream == _TRAINING else 0, stream)
        return TaskRows(self._task, lengths, context_length + 1, seed)


def _tokenizer_of(task: Task) -> Tokenizer:
    """Words with spaces between them, in their order."""
    vocabulary = {word: token_id for token_id, word in enumerate(task.words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=EOD_WORD))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    definition = json.dumps(json.loads(inner.to_str()), indent=1, sort_keys=True)
    return JsonTokenizer(definition.encode(), f"task {task.name}", EOD_WORD)
