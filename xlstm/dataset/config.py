"""The configuration of the input pipeline."""

import dataclasses
import re

from xlstm.finite import check_finite

STDLIB = "stdlib"
SHUFFLES = ("permutation", "grain", "contiguous")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run: what it trains and validates on, and the size of its batches.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    task: str = ""  # Train on a synthetic task of tasks.py instead of stores, such as "parity".
    task_lengths: tuple[int, ...] = (1, 40)  # Shortest and longest training example of the task.
    validation_lengths: tuple[str, ...] = ()  # Validate the task on these lengths ("41-256").
    stores: tuple[str, ...] = (STDLIB,)  # Token stores to train on; "stdlib" is Python's library.
    weights: tuple[float, ...] = ()  # Share of each store in training; empty: its share of tokens.
    context_length: int = 256  # Number of tokens in a row of a batch.
    batch_size: int = 16  # Number of rows in a global batch, over all processes.
    ramp_batch_sizes: tuple[int, ...] = ()  # Use these smaller batch sizes first, in this order.
    ramp_steps: tuple[int, ...] = ()  # Number of steps for each of the ramp_batch_sizes.
    validation_fraction: float = 0.02  # Hold out this fraction of documents to validate; 0: none.
    validation_stores: tuple[str, ...] = ()  # Validate on these stores too, each as "name=path".
    seed: int = 0  # Seed of the training order; the validation split does not depend on it.
    shuffle: str = "permutation"  # Order of an epoch. "permutation" yields every row once. "grain"
    # is the order of older runs, which at some sizes (such as 65,537 rows) skips one row. With
    # "contiguous", each row of a batch continues where that row of the previous batch ended.
    carry_state: bool = False  # Start each row with the state that the same row of the previous
    # batch ended with. This needs shuffle="contiguous"; validation then reads whole documents.

    def __post_init__(self):
        """Checks every field."""
        check_finite("data.", self)
        if not self.stores:
            raise ValueError("data.stores is empty: name at least one token store")
        if self.context_length < 1 or self.batch_size < 1:
            raise ValueError(
                "data.context_length and data.batch_size must be at least 1, but are "
                f"{self.context_length} and {self.batch_size}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in [0, 1), but is {self.validation_fraction}"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, but is {self.seed}")
        self._check_order()
        self._check_task()
        self._check_weights()
        self._check_ramp()
        self._check_validation_stores()

    @property
    def validation_ranges(self) -> dict[str, tuple[int, int]]:
        """The shortest and longest length of each entry of `validation_lengths`."""
        ranges = {text: re.fullmatch(r"(\d+)-(\d+)", text) for text in self.validation_lengths}
        return {text: (int(match[1]), int(match[2])) for text, match in ranges.items() if match}

    @property
    def validation_paths(self) -> dict[str, str]:
        """The path of each entry of `validation_stores`, by name."""
        entries = [entry.partition("=") for entry in self.validation_stores]
        return {name: path for name, _, path in entries}

    def _check_order(self):
        if self.shuffle not in SHUFFLES:
            raise ValueError(
                f"data.shuffle={self.shuffle!r} is unknown: choose one of {', '.join(SHUFFLES)}"
            )
        if self.carry_state and self.task:
            raise ValueError(
                "data.carry_state=True continues the documents of stores, but the examples of"
                f" data.task={self.task!r} end in their rows: set data.carry_state=False"
            )
        if self.carry_state and self.shuffle != "contiguous":
            raise ValueError(
                "data.carry_state=True continues each row in its next batch, which"
                f" data.shuffle={self.shuffle!r} does not keep in order: set"
                " data.shuffle='contiguous'"
            )
        if self.shuffle != "contiguous":
            return
        if self.task:
            raise ValueError(
                "data.shuffle='contiguous' reads stores in order, but"
                f" data.task={self.task!r} has none: set data.shuffle='permutation'"
            )
        if self.weights:
            raise ValueError(
                "data.shuffle='contiguous' reads one store after the other, which"
                f" data.weights={self.weights} would mix: leave data.weights empty"
            )
        if self.ramp_batch_sizes:
            raise ValueError(
                "data.shuffle='contiguous' needs a constant batch size, but"
                f" data.ramp_batch_sizes={self.ramp_batch_sizes} changes it: leave"
                " data.ramp_batch_sizes and data.ramp_steps empty"
            )

    def _check_task(self):
        if not self.task:
            if self.validation_lengths:
                raise ValueError("data.validation_lengths needs a data.task")
            return
        if self.weights or self.validation_stores:
            raise ValueError(
                f"data.task={self.task!r} replaces the stores: leave data.weights and"
                " data.validation_stores empty"
            )
        ranges, lengths = self.validation_ranges, self.task_lengths
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(
                f"data.task_lengths must be two lengths of at least 1, such as (1, 40), but is"
                f" {lengths}"
            )
        for text in self.validation_lengths:
            if text not in ranges or not 1 <= ranges[text][0] <= ranges[text][1]:
                raise ValueError(
                    f"data.validation_lengths has {text!r}: expected two lengths of at least 1,"
                    " such as 41-256"
                )
        if len(set(ranges)) != len(self.validation_lengths):
            raise ValueError(f"data.validation_lengths has duplicates: {self.validation_lengths}")

    def _check_weights(self):
        if not self.weights:
            return
        if len(self.weights) != len(self.stores):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.stores)} stores:"
                " expected one for each, or none"
            )
        if not all(weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"data.weights must be at least 0 and not all 0, but are {self.weights}"
            )

    def _check_ramp(self):
        if len(self.ramp_batch_sizes) != len(self.ramp_steps):
            raise ValueError(
                f"data.ramp_batch_sizes has {len(self.ramp_batch_sizes)} numbers and"
                f" data.ramp_steps {len(self.ramp_steps)}: expected a number of steps for each"
                " batch size"
            )
        if not all(1 <= size <= self.batch_size for size in self.ramp_batch_sizes):
            raise ValueError(
                f"data.ramp_batch_sizes must be from 1 to data.batch_size={self.batch_size}, but"
                f" are {self.ramp_batch_sizes}"
            )
        if not all(steps >= 1 for steps in self.ramp_steps):
            raise ValueError(f"data.ramp_steps must be at least 1 each, but are {self.ramp_steps}")

    def _check_validation_stores(self):
        for entry in self.validation_stores:
            if not re.fullmatch(r"[A-Za-z0-9_]+=.+", entry, re.DOTALL):
                raise ValueError(
                    f"data.validation_stores has {entry!r}: expected name=path, with a name of"
                    " letters, digits and _"
                )
        names = [entry.partition("=")[0] for entry in self.validation_stores]
        if len(set(names)) != len(names):
            raise ValueError(
                f"data.validation_stores has the names {', '.join(names)}: expected distinct names"
            )
