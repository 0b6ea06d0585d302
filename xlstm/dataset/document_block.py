"""Defines what files are cut into: blocks of documents, which any process can parse."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Block(abc.ABC):
    """Some neighbouring documents of the input.

    Attributes:
        input_bytes: How much of the input it stands for, in bytes on the disk.
    """

    input_bytes: int

    @abc.abstractmethod
    def texts(self, on_bad: Callable[[str], None] | None = None) -> Iterator[str]:
        """Yields the text of each document.

        Args:
            on_bad: Called with a message for each malformed record, which is then left out.

        Raises:
            ValueError: A record is malformed, and there is no `on_bad`; or its whole file is
                damaged. Says where.
            OSError: A file cannot be read.
        """

    def place(self, index: int) -> str:
        """Returns where a document is, for messages: "web.jsonl, line 17".

        Args:
            index: The number of the document, counted from 0 as `texts` yields them.
        """
        raise NotImplementedError


class RecordBlock(Block):
    """A block whose documents are found at numbered positions of its input."""

    def texts(self, on_bad: Callable[[str], None] | None = None) -> Iterator[str]:
        """Yields the text of each document, see `Block.texts`."""
        for _, text in self._numbered_texts(on_bad):
            yield text

    def place(self, index: int) -> str:
        """Returns where a document is, see `Block.place`; reads the block again to find it."""
        numbered = self._numbered_texts(lambda message: None)
        number, _ = next(itertools.islice(numbered, index, None))
        return self._place_of(number)

    @abc.abstractmethod
    def _numbered_texts(self, on_bad: Callable[[str], None] | None) -> Iterator[tuple[int, str]]:
        """Yields the number of each document, as `_place_of` takes it, and its text."""

    @abc.abstractmethod
    def _place_of(self, number: int) -> str:
        """Returns where the record of this number is."""


def report_bad(message: str, on_bad: Callable[[str], None] | None) -> None:
    """Hands the message about a bad record to `on_bad` or, without it, raises a ValueError."""
    if on_bad is None:
        raise ValueError(message)
    on_bad(message)
