"""Detection of what a file holds, so that a misnamed file never becomes training text."""

import csv
import json
import re

_MAGIC_BYTES = {
    b"version https://git-lfs.github.com/spec/": (
        "a Git LFS pointer instead of the data: fetch the data with 'git lfs pull'"
    ),
    b"\xff\xfe\0\0": "UTF-32 text: convert it to UTF-8 with iconv",
    b"\0\0\xfe\xff": "UTF-32 text: convert it to UTF-8 with iconv",
    b"\xff\xfe": "UTF-16 text: convert it with 'iconv -f UTF-16 -t UTF-8'",
    b"\xfe\xff": "UTF-16 text: convert it with 'iconv -f UTF-16 -t UTF-8'",
    b"\x1f\x8b": "gzip data: rename the file to end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd data: rename the file to end in .zst",
    b"\xfd7zXZ\0": "xz data: rename the file to end in .xz",
    b"PAR1\x15": "Parquet data: rename the file to end in .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"\x04\x22\x4d\x18": "lz4 data: decompress it",
    b"ARROW1\0\0": "an Arrow file: convert it to Parquet",
    b"FEA1\0": "a Feather file: convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database: export its text to JSON lines or Parquet",
    b"%PDF-": "a PDF document: extract its text",
}
_SAMPLE_LINES = 10
_SAMPLE_CHARACTERS = 20_000
_CSV_DELIMITERS = ",\t;|"


def foreign_content(head: bytes) -> str | None:
    """Recognizes formats other than UTF-8 text and JSON by the first bytes of a file.

    Args:
        head: The start of the content, ideally a few kilobytes.

    Returns:
        The format and what to do about it; None if the content may be text or JSON.
    """
    for magic, description in _MAGIC_BYTES.items():
        if head.startswith(magic):
            return description
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "bzip2 data: rename the file to end in .bz2"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    # In UTF-16, each ASCII character has a NUL byte: first in big-endian order, else second.
    sample = head[:1000]
    before, after = sample[::2].count(0), sample[1::2].count(0)
    if max(before, after) > 0.15 * len(sample) and min(before, after) < 0.01 * len(sample):
        encoding = "UTF-16LE" if after else "UTF-16BE"
        return f"{encoding} text: convert it with 'iconv -f {encoding} -t UTF-8'"
    return None


def decode_text(path: str, content: bytes) -> str:
    """Decodes the content of a text file, and rejects content that looks like data.

    Args:
        path: The file, for messages.
        content: Its whole content.

    Returns:
        The text, without a byte-order mark.

    Raises:
        ValueError: The content is not UTF-8, or is JSON, CSV or binary; the message says which.
    """
    if problem := foreign_content(content[:4096]):
        raise ValueError(f"{path} holds {problem}")
    if (position := content.find(0)) >= 0:
        raise ValueError(
            f"{path}, line {_line_of(content, position)}: not text, but binary or damaged (the "
            f"first of {content.count(0):,} NUL bytes)"
        )
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {_line_of(content, error.start)}: not UTF-8 text (byte "
            f"0x{content[error.start]:02x})"
        ) from error
    if _is_json(text):
        raise ValueError(
            f"{path} holds JSON instead of text: rename the file to end in .jsonl (an object a "
            "line) or .json, or leave it out"
        )
    if _is_csv(text):
        raise ValueError(
            f"{path} holds CSV instead of text: convert it to Parquet, or leave it out"
        )
    return text


def _line_of(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _is_json(text: str) -> bool:
    """Returns whether a text is JSON lines, a single value, or an array of objects."""
    start = text[:_SAMPLE_CHARACTERS].lstrip()[:1]
    if start not in ("{", "["):
        return False
    lines = text.split("\n", _SAMPLE_LINES)[:_SAMPLE_LINES]
    if all(isinstance(_parsed(line), dict) for line in lines if line.strip()):
        return True
    if start == "[":
        return isinstance(_parsed(text.lstrip()[1:].lstrip(), whole=False), dict)
    return bool(_parsed(text))


def _parsed(text: str, whole: bool = True) -> object:
    """Returns the JSON value that a text is (or starts with), or None."""
    try:
        return json.loads(text) if whole else json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def _is_csv(text: str) -> bool:
    """Returns whether the first lines are a header of plain words and rows of equal length."""
    lines = [line.rstrip("\r") for line in text[:_SAMPLE_CHARACTERS].split("\n")]
    is_whole = len(text) <= _SAMPLE_CHARACTERS and len(lines) <= _SAMPLE_LINES
    for delimiter in _CSV_DELIMITERS:
        # Prose has a space after a comma.
        names = [name.strip('"') for name in lines[0].split(delimiter)]
        if len(names) > 1 and all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            try:
                rows = list(csv.reader(lines[1:_SAMPLE_LINES], delimiter=delimiter))
            except csv.Error:
                return False
            rows = [row for row in (rows if is_whole else rows[:-1]) if row]
            return bool(rows) and all(len(row) == len(names) for row in rows)
    return False
