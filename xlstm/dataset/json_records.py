"""Reads documents from JSON: an object a line, an array of objects, or a single object."""

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Iterator

from xlstm.dataset.compressed_file import CompressedFile
from xlstm.dataset.document_block import Block, RecordBlock, report_bad
from xlstm.dataset.file_content import foreign_content

_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().decode  # Quicker than `json.loads`, which looks for options.


def json_blocks(path: str, text_column: str, is_lines: bool) -> Iterator[Block]:
    """Cuts a file of JSON into blocks, without parsing lines.

    Args:
        path: The file; it may be compressed.
        text_column: The key of the text. `a.b` is the key `b` in the object of the key `a`, unless
            there is a key `a.b`.
        is_lines: Whether a line is surely a record. Otherwise the file is looked at, and may also
            hold an array of objects, or objects of several lines.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: The file is damaged.
        OSError: It cannot be read.
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
    """Lines that are each an object with a document's text; blank ones are skipped."""

    path: str
    unit: str
    first: int
    lines: bytes
    text_column: str

    def _numbered_texts(self, on_bad: Callable[[str], None] | None) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            try:
                text = self._text(line)
            except (ValueError, RecursionError) as error:
                report_bad(f"{self._place_of(number)}: {error}", on_bad)
            else:
                yield number, text

    def _place_of(self, number: int) -> str:
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
            raise ValueError("its brackets are nested too deeply") from error
        except ValueError as error:  # What Python limits.
            raise ValueError("a number in it has too many digits") from error
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
    """Returns the value at `key` or `outer.key`; None if the outer object is null."""
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
    """Returns how a value is written in JSON, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _syntax_problem(line: bytes, error: json.JSONDecodeError) -> str:
    if num_nuls := line.count(0):
        return f"{num_nuls:,} NUL bytes, as a crash or a full disk leaves them: remove them"
    if line.strip() in (b"{", b"["):
        return "a value of several lines, which only a file with the ending .json may hold"
    return f"not JSON ({error.msg}, column {error.colno})"


def _lines(file: CompressedFile, head: bytes) -> Iterator[bytes]:
    """Yields pieces of some lines of a file, whose beginning is `head`."""
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
    """Returns whether a file that begins with `head` has an object a line.

    An object of several lines has none on a line of its own that is not indented.
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
    """Cuts an array, or values behind one another, into its values: parsing is what finds them.

    The buffer grows while a value is not whole, so it is bounded by the largest value.
    """

    def __init__(self, path: str, file: CompressedFile, head: bytes):
        self._path = path
        self._file = file
        # What is not UTF-8 is reported with the record that it is in.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer = self._utf8.decode(head.removeprefix(_BYTE_ORDER_MARK))
        self._start = 0
        self._is_at_end = False
        self._count = 0
        # Numbers are only skipped; as an `int` they may have too many digits.
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)

    def pieces(self) -> Iterator[bytes]:
        """Yields pieces of some values, each on a line of its own."""
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
        # A line break in a value is between its tokens: within a string it is written `\n`.
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
            self._fail(f"{self._what_is_next()} follows the last one")

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
                self._fail("its brackets are nested too deeply")
            else:
                if end < len(self._buffer) or self._is_at_end:
                    self._count += 1
                    value, self._start = self._buffer[self._start : end], end
                    return value
            self._read_on()

    def _next(self) -> str:
        """Returns the next character that is no whitespace, or "" at the end."""
        while True:
            self._start = _WHITESPACE.match(self._buffer, self._start).end()
            if self._start < len(self._buffer) or self._is_at_end:
                return self._buffer[self._start : self._start + 1]
            self._read_on()

    def _take(self, character: str) -> bool:
        """Skips a character if it is the next one."""
        is_next = self._next() == character
        self._start += is_next
        return is_next

    def _read_on(self) -> None:
        """Drops what was taken, and reads as much again as is left."""
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
            f"{self._path}, record {self._count}: {problem}; what follows cannot be read"
        )
