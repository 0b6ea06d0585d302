"""The token store: a folder with a tokenized corpus, read on demand.

    tokens.bin      the ids of all documents, concatenated, little-endian uint8/16/32
    documents.bin   int64: the index in tokens.bin at which each document starts, and the total
    tokenizer.json  the definition of the tokenizer, unless it is "byte"
    text_bytes.bin  (int64, int64) for each token whose number of bytes of text differs from what
                    the tokenizer says: its index in tokens.bin, and its bytes; only if there is one
    meta.json       `StoreMeta`: version, tokenizer, counts, the size and SHA-256 of each file

A document is `[bos_id] + tokens + [eod_id]`. If both markers are the same token, a document is
`[eod_id] + tokens`: the marker ends the previous document and starts this one. Markers occur
nowhere else. `token_store_writer` writes stores.

Version 1 has a single marker and no `text_bytes.bin`; it can still be read.
"""

import bisect
import os
import shlex
from collections.abc import Iterator, Sequence

import numpy as np

from xlstm.dataset.file_array import FileArray
from xlstm.dataset.store_meta import (
    CORRECTION_DTYPE,
    CORRECTIONS_FILE,
    DOCUMENTS_FILE,
    OFFSET_DTYPE,
    TOKENS_FILE,
    StoreMeta,
)
from xlstm.dataset.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    describe,
    load_tokenizer,
    same_tokenizer,
)
from xlstm.files import inner_path
from xlstm.installation import tool_command
from xlstm.visible_text import short_repr

META_FILE = "meta.json"
_MAX_META_BYTES = 1 << 20
_PIECE = 1 << 20  # Elements to check at a time.


class TokenStore:
    """An open token store.

    Attributes:
        path: The folder.
        meta: The content of `meta.json`.
        tokens: `(num_tokens,)` ids.
        documents: `(num_documents + 1,)` int64: document `i` is `tokens[documents[i] :
            documents[i + 1]]`.
        corrections: `(C,)`, `index` and `bytes`: the index, ascending, of each token whose number
            of bytes of text differs from what the tokenizer says, and its bytes.
        problem: The error that `store_guard` found since the store was opened, or None.
    """

    problem: Exception | None = None

    def __init__(
        self,
        path: str,
        meta: StoreMeta,
        tokens: FileArray,
        documents: FileArray,
        corrections: FileArray | np.ndarray,
    ):
        """Takes the parts that `open` reads and checks."""
        self.path = path
        self.meta = meta
        self.tokens = tokens
        self.documents = documents
        self.corrections = corrections

    @classmethod
    def open(cls, path: str) -> "TokenStore":
        """Opens a store and checks the sizes of its files and the order of its offsets.

        It does not verify checksums: `store_guard` does.

        Args:
            path: The folder.

        Returns:
            The store.

        Raises:
            ValueError: The store is missing, unreadable, truncated or damaged.
        """
        try:
            meta = _read_meta(path)
            tokens = _open_file(path, meta, TOKENS_FILE, np.dtype(meta.dtype))
            documents = _open_file(path, meta, DOCUMENTS_FILE, OFFSET_DTYPE)
            corrections = np.zeros(0, CORRECTION_DTYPE)
            if CORRECTIONS_FILE in meta.files:
                corrections = _open_file(path, meta, CORRECTIONS_FILE, CORRECTION_DTYPE)
            if TOKENIZER_FILE in meta.files:
                _open_file(path, meta, TOKENIZER_FILE, np.dtype(np.uint8))
            _check_documents(path, meta, documents)
            _check_corrections(path, meta, corrections)
        except OSError as error:
            raise ValueError(f"cannot read {error.filename or path}: {error.strerror}") from error
        return cls(path, meta, tokens, documents, corrections)

    @property
    def files(self) -> dict[str, FileArray]:
        """The open files, by name."""
        files = {DOCUMENTS_FILE: self.documents, TOKENS_FILE: self.tokens}
        if isinstance(self.corrections, FileArray):
            files[CORRECTIONS_FILE] = self.corrections
        return files

    def check(self) -> None:
        """Raises `problem` if there is one."""
        if self.problem is not None:
            raise self.problem

    def load_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that the store was written with.

        Raises:
            ValueError: The `tokenizer.json` in the store is not the one it was written with.
        """
        if self.meta.tokenizer == TOKENIZER_FILE:
            definition = inner_path(self.path, TOKENIZER_FILE)
            tokenizer = load_tokenizer(definition, self.meta.eod_token, self.meta.bos_token)
        else:
            tokenizer = load_tokenizer(self.meta.tokenizer)
        for name in ("fingerprint", "vocab_size", "eod_id", "eod_token", "bos_id", "bos_token"):
            found, expected = getattr(tokenizer, name), getattr(self.meta, name)
            if found != expected:
                raise ValueError(
                    f"the token store {self.path} is damaged: {name} of its tokenizer"
                    f" {tokenizer.name} is {short_repr(found)}, {META_FILE} says"
                    f" {short_repr(expected)}"
                )
        return tokenizer

    def count_text_bytes(self, start: int, stop: int, tokenizer: Tokenizer) -> int | None:
        """Counts the bytes of text that a range of tokens represents.

        Markers have none. The count of all tokens is `meta.text_bytes`.

        Args:
            start: The index of the first token.
            stop: The index after the last token.
            tokenizer: The result of `load_tokenizer`.

        Returns:
            The bytes in UTF-8; None for a store of version 1 unless its tokenizer is lossless.
        """
        if self.meta.version == 1 and not tokenizer.is_lossless:
            return None
        ids = np.asarray(self.tokens[max(start - 1, 0) : stop], np.int64)
        # A token is the first of a text if it follows a marker.
        is_inside = np.zeros(ids.size, np.int64)
        is_inside[1:] = ids[:-1] != self.meta.bos_id
        sizes = tokenizer.token_byte_counts[is_inside, ids][ids.size - (stop - start) :]
        first, last = (
            bisect.bisect_left(self.corrections, index, key=lambda entry: entry["index"])
            for index in (start, stop)
        )
        corrected = self.corrections[first:last]
        sizes[corrected["index"] - start] = corrected["bytes"]
        return int(sizes.sum())


def check_same_tokenizer(stores: Sequence[TokenStore]) -> None:
    """Raises a ValueError if two stores were written with different tokenizers."""
    for store in stores[1:]:
        if _names(store.meta) == _names(stores[0].meta):
            continue
        one, other = stores[0].load_tokenizer(), store.load_tokenizer()
        if not same_tokenizer(one, other):
            raise ValueError(
                f"the token stores {stores[0].path} and {store.path} cannot be used in one run: "
                f"they were written with different tokenizers ({describe(one)} and"
                f" {describe(other)})"
            )


def _names(meta: StoreMeta) -> tuple[str, str]:
    """Returns names that are equal only for the same tokenizer, but may differ even then."""
    return meta.fingerprint, meta.bos_token


def _read_meta(path: str) -> StoreMeta:
    """Reads `meta.json`; raises a ValueError or an OSError."""
    try:
        meta_path = inner_path(path, META_FILE)
        content = FileArray(meta_path, np.uint8)[: _MAX_META_BYTES + 1].tobytes()
        if len(content) > _MAX_META_BYTES:
            raise ValueError(f"it has more than {_MAX_META_BYTES:,} bytes")
        return StoreMeta.from_json(content.decode("utf-8"))
    except FileNotFoundError as error:
        if not os.path.isdir(path):
            raise ValueError(f"no token store at {path}: the folder does not exist") from error
        raise ValueError(
            f"{path} is not a token store, or was never finished: it has no {META_FILE};"
            f" {_text_hint(path)}"
        ) from error
    except NotADirectoryError as error:
        raise ValueError(f"{path} is a file, not a token store; {_text_hint(path)}") from error
    except ValueError as error:
        raise ValueError(f"cannot use the token store {path}: {META_FILE}: {error}") from error


def _text_hint(path: str) -> str:
    """Returns how to make a token store, in case the user names text instead of a store."""
    arguments = f"--output=FOLDER --input={shlex.quote(path)}"
    return f"to make a store of text, run: {tool_command('prepare_data')} {arguments}"


def _open_file(path: str, meta: StoreMeta, name: str, dtype: np.dtype) -> FileArray:
    """Opens a file of a store; raises a ValueError if its size contradicts `meta.json`."""
    file = FileArray(inner_path(path, name), dtype)
    if file.num_bytes != meta.files[name]["bytes"]:
        raise ValueError(
            f"the token store {path} is truncated or damaged: {name} has {file.num_bytes} bytes, "
            f"{META_FILE} says {meta.files[name]['bytes']}"
        )
    return file


def _check_documents(path: str, meta: StoreMeta, documents: FileArray) -> None:
    """Raises a ValueError if the documents do not cover all tokens in order."""
    problem = f"the first is {documents[0]}" if documents[0] else ""
    if not problem and documents[-1] != meta.num_tokens:
        problem = f"the last is {documents[-1]}"
    for first, offsets in [] if problem else _overlapping_pieces(documents):
        falls = np.flatnonzero(offsets[1:] <= offsets[:-1])
        if falls.size:
            number = int(falls[0])
            problem = f"document {first + number:,} would start at {offsets[number]} and end at"
            problem = f"{problem} {offsets[number + 1]}"
            break
    if problem:
        raise ValueError(
            f"the token store {path} is damaged: the offsets in {DOCUMENTS_FILE} do not rise from"
            f" 0 to {meta.num_tokens} ({problem})"
        )


def _check_corrections(path: str, meta: StoreMeta, corrections: FileArray | np.ndarray) -> None:
    """Raises a ValueError if the corrections do not refer to tokens in ascending order."""
    for first, entries in _overlapping_pieces(corrections):
        index, num_bytes = entries["index"], entries["bytes"]
        is_bad = (index < 0) | (index >= meta.num_tokens)
        is_bad |= (num_bytes < 0) | (num_bytes > meta.text_bytes)
        is_bad[1:] |= index[1:] <= index[:-1]
        if is_bad.any():
            number = int(np.argmax(is_bad))
            raise ValueError(
                f"the token store {path} is damaged: entry {first + number:,} of "
                f"{CORRECTIONS_FILE} gives token {index[number]} {num_bytes[number]} bytes; "
                f"expected ascending tokens from 0 to {meta.num_tokens - 1} and 0 to "
                f"{meta.text_bytes} bytes"
            )


def _overlapping_pieces(array: FileArray | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the start of each piece, and the piece with the first element of the next one."""
    for first in range(0, len(array), _PIECE):
        yield first, array[first : first + _PIECE + 1]
