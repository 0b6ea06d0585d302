"""How the kinds of blocks follow each other in a model."""

import dataclasses
import itertools
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring blocks of one kind.

    Attributes:
        kind: Their kind.
        length: How many they are.
        first: Place of the first one among the blocks of a repetition.
        first_of_kind: Place of the first one among those of its kind.
    """

    kind: str
    length: int
    first: int
    first_of_kind: int


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """The shortest sequence of blocks that, repeated, makes the model.

    Attributes:
        runs: The sequence.
        repeats: How often it is repeated.
    """

    runs: tuple[Run, ...]
    repeats: int

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are of one kind."""
        return len(self.runs) == 1

    def length(self, kind: str | None = None) -> int:
        """The number of blocks of one repetition: of one kind, or all."""
        return sum(run.length for run in self.runs if kind in (None, run.kind))

    @property
    def counts(self) -> dict[str, int]:
        """The number of blocks of each kind in the model, in the order of their first ones."""
        return {run.kind: self.repeats * self.length(run.kind) for run in self.runs}


def find_pattern(kinds: Sequence[str], repeats: int = 1) -> BlockPattern:
    """Finds the pattern of a sequence of kinds of blocks, at least one.

    Args:
        kinds: The kinds.
        repeats: How often the sequence is repeated; the time does not depend on it.

    Returns:
        The pattern.
    """
    count = len(kinds)
    size = next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and list(kinds) == list(kinds[:size]) * (count // size)
    )
    runs, first, of_kind = [], 0, dict.fromkeys(kinds, 0)
    for kind, blocks in itertools.groupby(kinds[:size]):
        length = len(list(blocks))
        runs.append(Run(kind, length, first, of_kind[kind]))
        first, of_kind[kind] = first + length, of_kind[kind] + length
    return BlockPattern(tuple(runs), repeats * (count // size))


def parse_ratio(text: str) -> tuple[int, int]:
    """Reads the notation `[a:b]`: of `a + b` blocks in a row the last `b` are sLSTM blocks.

    Raises:
        ValueError: If it is not that, or both are 0.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), section 4.
    """
    match = re.fullmatch(r"\[(\d{1,6}):(\d{1,6})\]", text)
    ratio = tuple(map(int, match.groups())) if match else (0, 0)
    if not any(ratio):
        raise ValueError(
            f"model.ratio={text!r}: write it as '[7:1]', of eight blocks seven mLSTM and one sLSTM"
        )
    return ratio
