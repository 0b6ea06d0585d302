"""Blocks of documents: the pieces of input files that threads parse independently."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class DocumentBlock(abc.ABC):
    """Consecutive documents of the input.

    Attributes:
        input_bytes: The size of its part of the input, in bytes on disk.
    """

    input_bytes: int

    @abc.abstractmethod
    def texts(self, on_bad_record: Callable[[str], None] | None = None) -> Iterator[str]:
        """Yields the text of each document.

        Args:
            on_bad_record: Called with a message for each malformed record, which is then skipped.

        Raises:
            ValueError: A record is malformed and `on_bad_record` is None, or the whole file is
                damaged. The message names the location.
            OSError: A file cannot be read.
        """

    def location(self, index: int) -> str:
        """Returns the location of a document for messages, such as "web.jsonl, line 17".

        Args:
            index: The index of the document in the order of `texts`, from 0.
        """
        raise NotImplementedError


class RecordBlock(DocumentBlock):
    """A block whose documents are numbered records: lines, rows or files."""

    def texts(self, on_bad_record: Callable[[str], None] | None = None) -> Iterator[str]:
        """Yields the text of each document; see `DocumentBlock.texts`."""
        for _, text in self._numbered_texts(on_bad_record):
            yield text

    def location(self, index: int) -> str:
        """Returns the location of a document, for which it reads the block again."""
        numbered = self._numbered_texts(lambda message: None)
        number, _ = next(itertools.islice(numbered, index, None))
        return self._record_location(number)

    @abc.abstractmethod
    def _numbered_texts(
        self, on_bad_record: Callable[[str], None] | None
    ) -> Iterator[tuple[int, str]]:
        """Yields the record number and the text of each document."""

    @abc.abstractmethod
    def _record_location(self, number: int) -> str:
        """Returns the location of a record."""


def report_bad_record(message: str, on_bad_record: Callable[[str], None] | None) -> None:
    """Passes a message to `on_bad_record`; raises it as a ValueError if that is None."""
    if on_bad_record is None:
        raise ValueError(message)
    on_bad_record(message)
