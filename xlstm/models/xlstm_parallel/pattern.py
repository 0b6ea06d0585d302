"""The order of the kinds of blocks in a model."""

import dataclasses
import itertools
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of one kind.

    Attributes:
        kind: Kind of the blocks.
        length: Number of blocks.
        first: Index of the first block in a repetition of the pattern.
        first_of_kind: Index of the first block among the blocks of its kind in a repetition.
    """

    kind: str
    length: int
    first: int
    first_of_kind: int


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """The shortest sequence of blocks whose repetition is the model.

    Attributes:
        groups: The sequence, as groups of blocks of one kind.
        repeats: Number of repetitions of the sequence.
    """

    groups: tuple[BlockGroup, ...]
    repeats: int

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are of one kind."""
        return len(self.groups) == 1

    def length(self, kind: str | None = None) -> int:
        """Returns the number of blocks in a repetition, of one kind or of all."""
        return sum(group.length for group in self.groups if kind in (None, group.kind))

    @property
    def counts(self) -> dict[str, int]:
        """Number of blocks of each kind in the model, in order of first appearance."""
        return {group.kind: self.repeats * self.length(group.kind) for group in self.groups}


def find_pattern(kinds: Sequence[str], repeats: int = 1) -> BlockPattern:
    """Finds the pattern of a sequence of blocks.

    Args:
        kinds: Kinds of the blocks, at least one.
        repeats: Number of repetitions of `kinds`; the time does not depend on it.

    Returns:
        The pattern of all repetitions.
    """
    count = len(kinds)
    size = next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and list(kinds) == list(kinds[:size]) * (count // size)
    )
    groups, first, of_kind = [], 0, dict.fromkeys(kinds, 0)
    for kind, blocks in itertools.groupby(kinds[:size]):
        length = len(list(blocks))
        groups.append(BlockGroup(kind, length, first, of_kind[kind]))
        first, of_kind[kind] = first + length, of_kind[kind] + length
    return BlockPattern(tuple(groups), repeats * (count // size))


def parse_ratio(text: str) -> tuple[int, int]:
    """Parses the notation `[a:b]`: the last `b` of every `a + b` blocks are sLSTM blocks.

    Args:
        text: The ratio.

    Returns:
        The numbers `a` and `b`.

    Raises:
        ValueError: If `text` has another form, or both numbers are 0.

    References:
        Beck et al., "xLSTM", 2024 (arXiv 2405.04517), section 4.
    """
    match = re.fullmatch(r"\[(\d{1,6}):(\d{1,6})\]", text)
    ratio = tuple(map(int, match.groups())) if match else (0, 0)
    if not any(ratio):
        raise ValueError(
            f"model.ratio={text!r}: expected a form such as '[7:1]', seven mLSTM blocks"
            " and then one sLSTM block"
        )
    return ratio
