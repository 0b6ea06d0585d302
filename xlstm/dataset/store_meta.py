"""The `meta.json` of a token store: its fields and their checks."""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from xlstm.dataset.tokenizer import TOKENIZER_FILE, ByteTokenizer
from xlstm.files import parse_json
from xlstm.visible_text import short_repr

FORMAT = "xlstm token store"
VERSION = 2
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.bin"
CORRECTIONS_FILE = "text_bytes.bin"
OFFSET_DTYPE = np.dtype("<i8")
CORRECTION_DTYPE = np.dtype([("index", OFFSET_DTYPE), ("bytes", OFFSET_DTYPE)])
_TOKEN_DTYPES = ("|u1", "<u2", "<u4")


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """The content of `meta.json`.

    Attributes:
        tokenizer: "byte", or "tokenizer.json" if the store holds the definition.
        fingerprint: See `Tokenizer`, as for the next five fields.
        vocab_size: The size of the id space.
        eod_id: The id of the marker after documents.
        eod_token: The vocabulary entry of that marker.
        bos_id: The id of the marker before documents.
        bos_token: The vocabulary entry of that marker.
        dtype: The type of `tokens.bin`, in NumPy's notation.
        num_documents: The number of documents.
        num_tokens: The number of tokens, markers included.
        text_bytes: The size of the text in UTF-8.
        files: The size in `bytes` and the `sha256` of every other file of the store, by name.
        version: The version of the format.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    eod_token: str
    bos_id: int
    bos_token: str
    dtype: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    files: dict[str, dict[str, Any]]
    version: int = VERSION

    def to_json(self) -> str:
        """Returns the text of `meta.json`."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "StoreMeta":
        """Parses the text of `meta.json`; raises a ValueError if it is not valid."""
        fields = parse_json(text, "it", strict=True)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"it does not describe an {FORMAT}")
        version = fields.get("version")
        if type(version) is not int or version not in (1, VERSION):
            raise ValueError(
                f"it has format version {short_repr(version)}: expected 1 or {VERSION}"
            )
        if version == 1:  # Version 1 has a single marker.
            fields |= {"bos_id": fields.get("eod_id"), "bos_token": fields.get("eod_token")}
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(names ^ fields.keys()):
            problem = "is missing" if name in names else "is unknown"
            raise ValueError(
                f"its fields are not those of version {version}: {short_repr(name)} {problem}"
            )
        for field in dataclasses.fields(cls):
            value = fields[field.name]
            if field.type in (str, int) and type(value) is not field.type:
                kind = "a string" if field.type is str else "an integer"
                raise ValueError(f"its {field.name} is {short_repr(value)}: expected {kind}")
        meta = cls(**fields)
        _check_values(meta)
        _check_files(meta)
        return meta


def _check_values(meta: StoreMeta) -> None:
    """Raises a ValueError if a field has an impossible value."""
    if meta.tokenizer not in (ByteTokenizer.name, TOKENIZER_FILE):
        raise ValueError(
            f"its tokenizer is {short_repr(meta.tokenizer)}: expected {ByteTokenizer.name!r} or"
            f" {TOKENIZER_FILE!r}"
        )
    if meta.dtype not in _TOKEN_DTYPES:
        raise ValueError(
            f"its dtype is {short_repr(meta.dtype)}: expected one of"
            f" {', '.join(map(repr, _TOKEN_DTYPES))}"
        )
    num_ids = 256 ** np.dtype(meta.dtype).itemsize
    for name, least, most in [
        ("vocab_size", 1, num_ids),
        ("eod_id", 0, meta.vocab_size - 1),
        ("bos_id", 0, meta.vocab_size - 1),
        ("num_documents", 1, 2**60),
        ("num_tokens", meta.num_documents + 1, 2**60),
        ("text_bytes", 0, 2**60),
    ]:
        if not least <= getattr(meta, name) <= most:
            raise ValueError(
                f"its {name} is {short_repr(getattr(meta, name))}: expected at least {least} and"
                f" at most {most}"
            )


def _check_files(meta: StoreMeta) -> None:
    """Raises a ValueError if an entry of `files` is invalid or contradicts the counts."""
    needed = {TOKENS_FILE, DOCUMENTS_FILE}
    if meta.tokenizer == TOKENIZER_FILE:
        needed.add(TOKENIZER_FILE)
    if not isinstance(meta.files, dict) or not needed <= meta.files.keys():
        raise ValueError(f"its files lack one of {', '.join(sorted(needed))}")
    for name, entry in meta.files.items():
        if name not in needed | {CORRECTIONS_FILE}:
            raise ValueError(f"its files have {short_repr(name)}, which is not part of the format")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"its entry of {name} is not the file's bytes and sha256")
        if type(entry["bytes"]) is not int or entry["bytes"] < 0:
            raise ValueError(f"its entry of {name} has {short_repr(entry['bytes'])} bytes")
        digest = entry["sha256"]
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"its entry of {name} has the SHA-256 {short_repr(digest)}")
    expected = {
        TOKENS_FILE: meta.num_tokens * np.dtype(meta.dtype).itemsize,
        DOCUMENTS_FILE: (meta.num_documents + 1) * OFFSET_DTYPE.itemsize,
    }
    if any(meta.files[name]["bytes"] != size for name, size in expected.items()):
        raise ValueError("its counts and file sizes contradict each other")
    if meta.files.get(CORRECTIONS_FILE, {"bytes": 0})["bytes"] % CORRECTION_DTYPE.itemsize:
        raise ValueError(f"its {CORRECTIONS_FILE} ends with an incomplete entry")
