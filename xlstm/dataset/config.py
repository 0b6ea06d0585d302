"""The settings of the input pipeline."""

import dataclasses
import re

from xlstm.finite import check_finite

STDLIB = "stdlib"
SHUFFLES = ("permutation", "grain")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which pieces.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    task: str = ""  # A task whose examples are made on the fly, in place of stores: see tasks.py.
    task_lengths: tuple[int, ...] = (1, 40)  # Shortest and longest example to train on.
    validation_lengths: tuple[str, ...] = ()  # Lengths of a task to validate on, "41-256" say.
    stores: tuple[str, ...] = (STDLIB,)  # Token stores (folders); "stdlib": Python's own library.
    weights: tuple[float, ...] = ()  # Share of each store in training; empty: by its tokens.
    context_length: int = 256  # Tokens in a row of a batch.
    batch_size: int = 16  # Rows in a batch, over all processes.
    ramp_batch_sizes: tuple[int, ...] = ()  # Batch sizes before that one, in turn.
    ramp_steps: tuple[int, ...] = ()  # For how many steps each of them is used.
    validation_fraction: float = 0.02  # Share of the documents kept for validation; 0: none.
    validation_stores: tuple[str, ...] = ()  # More to validate on: "name=path of a token store".
    seed: int = 0  # Order of the training rows; the validation split does not depend on it.
    shuffle: str = "permutation"  # Order of an epoch: permutation, in which every row of a store
    # comes once; grain, that of runs that began before, in which of 65,537 rows one never comes.

    def __post_init__(self):
        """Checks every field."""
        check_finite("data.", self)
        if not self.stores:
            raise ValueError("data.stores is empty: name at least one token store")
        if self.context_length < 1 or self.batch_size < 1:
            raise ValueError(
                "data.context_length and data.batch_size must be at least 1, not "
                f"{self.context_length} and {self.batch_size}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in [0, 1), not {self.validation_fraction}"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, but is {self.seed}")
        if self.shuffle not in SHUFFLES:
            raise ValueError(
                f"data.shuffle={self.shuffle!r} is unknown: choose one of {', '.join(SHUFFLES)}"
            )
        self._check_task()
        self._check_weights()
        self._check_ramp()
        self._check_validation_stores()

    @property
    def validation_ranges(self) -> dict[str, tuple[int, int]]:
        """Shortest and longest length of each of `validation_lengths`, by its text."""
        ranges = {text: re.fullmatch(r"(\d+)-(\d+)", text) for text in self.validation_lengths}
        return {text: (int(match[1]), int(match[2])) for text, match in ranges.items() if match}

    @property
    def validation_paths(self) -> dict[str, str]:
        """The path of each of `validation_stores`, by its name."""
        entries = [entry.partition("=") for entry in self.validation_stores]
        return {name: path for name, _, path in entries}

    def _check_task(self):
        if not self.task:
            if self.validation_lengths:
                raise ValueError("data.validation_lengths needs a data.task")
            return
        if self.weights or self.validation_stores:
            raise ValueError(
                f"data.task={self.task!r} takes the place of stores: leave data.weights and"
                " data.validation_stores empty"
            )
        ranges, lengths = self.validation_ranges, self.task_lengths
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(
                f"data.task_lengths must be two lengths from 1 on, such as (1, 40), not {lengths}"
            )
        for text in self.validation_lengths:
            if text not in ranges or not 1 <= ranges[text][0] <= ranges[text][1]:
                raise ValueError(
                    f"data.validation_lengths has {text!r}: write two lengths from 1 on, such as"
                    " 41-256"
                )
        if len(set(ranges)) != len(self.validation_lengths):
            raise ValueError(
                f"data.validation_lengths names lengths twice: {self.validation_lengths}"
            )

    def _check_weights(self):
        if not self.weights:
            return
        if len(self.weights) != len(self.stores):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.stores)} stores: give "
                "one for each, or none"
            )
        if not all(weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"data.weights must not be negative, and not all 0, but are {self.weights}"
            )

    def _check_ramp(self):
        if len(self.ramp_batch_sizes) != len(self.ramp_steps):
            raise ValueError(
                f"data.ramp_batch_sizes has {len(self.ramp_batch_sizes)} numbers and"
                f" data.ramp_steps {len(self.ramp_steps)}: give a number of steps for each batch"
                " size"
            )
        if not all(1 <= size <= self.batch_size for size in self.ramp_batch_sizes):
            raise ValueError(
                f"data.ramp_batch_sizes must be from 1 to data.batch_size={self.batch_size}, not"
                f" {self.ramp_batch_sizes}"
            )
        if not all(steps >= 1 for steps in self.ramp_steps):
            raise ValueError(f"data.ramp_steps must be at least 1 each, not {self.ramp_steps}")

    def _check_validation_stores(self):
        for entry in self.validation_stores:
            if not re.fullmatch(r"[A-Za-z0-9_]+=.+", entry, re.DOTALL):
                raise ValueError(
                    f"data.validation_stores has {entry!r}: write name=path, the name of letters,"
                    " digits and _"
                )
        names = [entry.partition("=")[0] for entry in self.validation_stores]
        if len(set(names)) != len(names):
            raise ValueError(
                f"data.validation_stores has the names {', '.join(names)}: give each store its own"
            )
