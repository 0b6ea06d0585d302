"""Reader of documents in JSON: JSON lines, an array of objects, or single objects."""

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Iterator

from xlstm.dataset.compressed_file import CompressedFile
from xlstm.dataset.document_block import DocumentBlock, RecordBlock, report_bad_record
from xlstm.dataset.file_content import foreign_content

_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().decode  # Faster than `json.loads`, which checks its options.


def json_blocks(path: str, text_column: str, is_lines: bool) -> Iterator[DocumentBlock]:
    """Splits a JSON file into blocks, without parsing its lines.

    Args:
        path: The file; it may be compressed.
        text_column: The key of the text. `a.b` is the key `b` in the object of the key `a`, unless
            there is a key `a.b`.
        is_lines: Whether each line is known to be a record. If not, the content decides: it may
            also be an array of objects, or objects that span several lines.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: The file is damaged.
        OSError: The file cannot be read.
    """
    with CompressedFile(path) as file:
        head = file.read(_BLOCK_BYTES)
        if problem := foreign_content(head):
            raise ValueError(f"{path} holds {problem}")
        is_lines = is_lines or _holds_lines(head)
        pieces = _lines(file, head) if is_lines else _Values(path, file, head).pieces()
        unit = "line" if is_lines else "record"
        first, position = 1, 0
        for piece in pieces:
            yield _JsonRecords(file.position - position, path, unit, first, piece, text_column)
            first, position = first + piece.count(b"\n"), file.position


@dataclasses.dataclass(frozen=True)
class _JsonRecords(RecordBlock):
    """Lines that each hold an object with a document's text; blank lines are skipped."""

    path: str
    unit: str
    first: int
    lines: bytes
    text_column: str

    def _numbered_texts(
        self, on_bad_record: Callable[[str], None] | None
    ) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            try:
                text = self._text(line)
            except (ValueError, RecursionError) as error:
                report_bad_record(f"{self._record_location(number)}: {error}", on_bad_record)
            else:
                yield number, text

    def _record_location(self, number: int) -> str:
        return f"{self.path}, {self.unit} {number}"

    def _text(self, line: bytes) -> str:
        try:
            source = line.removeprefix(_BYTE_ORDER_MARK).decode()
            record = _decode(source)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
        except json.JSONDecodeError as error:
            raise ValueError(_syntax_problem(line, error)) from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        except ValueError as error:  # Python limits the digits of an integer.
            raise ValueError("it holds a number with too many digits") from error
        if not isinstance(record, dict):
            raise ValueError(f"not a JSON object, but {shortened(record)}")
        text = _value_at(record, self.text_column)
        if not isinstance(text, str | None):
            raise ValueError(f"{self.text_column!r} is not a string, but {shortened(text)}")
        text = text or ""  # A null is an empty document.
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{self.text_column!r} is not valid Unicode: {error.reason}"
                ) from error
        return text


def _value_at(record: dict[str, object], path: str) -> object:
    """Returns the value at `key` or `outer.key`; None if an outer object is null."""
    if path in record:
        return record[path]
    name, dot, rest = path.partition(".")
    if not dot or name not in record:
        raise ValueError(f"no {path!r} among its keys {shortened(list(record))}")
    inner = record[name]
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise ValueError(f"{name!r} is not an object, but {shortened(inner)}")
    return _value_at(inner, rest)


def shortened(value: object) -> str:
    """Returns the JSON of a value, shortened to at most 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _syntax_problem(line: bytes, error: json.JSONDecodeError) -> str:
    if num_nuls := line.count(0):
        return f"{num_nuls:,} NUL bytes, perhaps from a crash or a full disk: remove them"
    if line.strip() in (b"{", b"["):
        return "a value of several lines: rename the file to end in .json"
    return f"not JSON ({error.msg}, column {error.colno})"


def _lines(file: CompressedFile, head: bytes) -> Iterator[bytes]:
    """Yields pieces of whole lines of a file that starts with `head`."""
    pending, data = [], head
    while data:
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*pending, data[:end]])
            pending = []
        pending.append(data[end:])
        data = file.read(_BLOCK_BYTES)
    if rest := b"".join(pending):
        yield rest


def _holds_lines(head: bytes) -> bool:
    """Returns whether a file that starts with `head` is JSON lines.

    An object that spans several lines has no unindented line that is an object itself.
    """
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not head.startswith((b"[", b"{")):
        return True
    return head.startswith(b"{") and any(map(_is_object, head.split(b"\n", 100)[:100]))


def _is_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Values:
    """A parser that splits an array, or consecutive values, into single values.

    The buffer grows while a value is incomplete, so the largest value bounds it.
    """

    def __init__(self, path: str, file: CompressedFile, head: bytes):
        self._path = path
        self._file = file
        # Invalid UTF-8 is reported later, with the record that holds it.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer = self._utf8.decode(head.removeprefix(_BYTE_ORDER_MARK))
        self._start = 0
        self._is_at_end = False
        self._count = 0
        # Numbers are only skipped; as an `int`, one may have too many digits.
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)

    def pieces(self) -> Iterator[bytes]:
        """Yields pieces of several values, each on its own line."""
        values, size = [], 0
        for value in self._values():
            values.append(value)
            size += len(value)
            if size >= _BLOCK_BYTES:
                yield self._as_lines(values)
                values, size = [], 0
        if values:
            yield self._as_lines(values)

    def _as_lines(self, values: list[str]) -> bytes:
        # A line break is between tokens: inside a string it is written as `\n`.
        lines = "".join(value.replace("\n", " ") + "\n" for value in values)
        return lines.encode("utf-8", "surrogateescape")

    def _values(self) -> Iterator[str]:
        """Yields the source of each value."""
        if self._take("["):
            is_open = not self._take("]")
            while is_open:
                yield self._value()
                is_open = self._take(",")
                if not is_open and not self._take("]"):
                    self._fail(f"{self._what_is_next()} follows instead of ',' or ']'")
        else:
            while self._next() not in ("", "\0"):
                yield self._value()
        if self._next():
            self._fail(f"{self._what_is_next()} follows the last record")

    def _value(self) -> str:
        while True:
            self._next()
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                is_cut_off = error.msg.startswith("Unterminated") or (
                    error.pos > len(self._buffer) - 16
                )
                if self._is_at_end or not is_cut_off:
                    self._count += 1
                    self._fail(f"not JSON ({error.msg}): {self._what_is_next()}")
            except RecursionError:
                self._count += 1
                self._fail("it is nested too deeply")
            else:
                if end < len(self._buffer) or self._is_at_end:
                    self._count += 1
                    value, self._start = self._buffer[self._start : end], end
                    return value
            self._read_on()

    def _next(self) -> str:
        """Returns the next character after whitespace, or "" at the end."""
        while True:
            self._start = _WHITESPACE.match(self._buffer, self._start).end()
            if self._start < len(self._buffer) or self._is_at_end:
                return self._buffer[self._start : self._start + 1]
            self._read_on()

    def _take(self, character: str) -> bool:
        """Skips a character if it comes next, and returns whether it did."""
        is_next = self._next() == character
        self._start += is_next
        return is_next

    def _read_on(self) -> None:
        """Drops the consumed part of the buffer, and doubles the rest by reading on."""
        self._buffer = self._buffer[self._start :]
        self._start = 0
        data = self._file.read(max(_BLOCK_BYTES, len(self._buffer)))
        self._is_at_end = not data
        self._buffer += self._utf8.decode(data, final=not data)

    def _what_is_next(self) -> str:
        start = self._buffer[self._start : self._start + 20]
        return repr(start) if start else "the end of the file"

    def _fail(self, problem: str) -> None:
        raise ValueError(
            f"{self._path}, record {self._count}: {problem}; the rest of the file cannot be read"
        )
