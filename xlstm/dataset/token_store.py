"""The token store: a folder that holds a tokenised corpus, read piece by piece.

    tokens.bin      the ids of all documents, one behind the other, little-endian uint8/16/32
    documents.bin   int64: where each document starts in tokens.bin, and at last where it ends
    tokenizer.json  the tokenizer's definition, unless it is "byte"
    text_bytes.bin  (int64, int64) for each token that stands for another number of bytes of text
                    than the tokenizer says: its index in tokens.bin, and those bytes; if any does
    meta.json       `StoreMeta`: version, tokenizer, counts, the size and SHA-256 of each file

A document is `[bos_id] + tokens + [eod_id]`. If both markers are the same token, it is `[eod_id] +
tokens`: the marker is at once the end of the document before and the start of this one. Markers
occur nowhere else. `token_store_writer` writes stores.

Version 1 knew only one marker and no `text_bytes.bin`; it is still read.
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
from xlstm.visible_text import short_repr

META_FILE = "meta.json"
_MAX_META_BYTES = 1 << 20
_PIECE = 1 << 20  # Elements that are checked at a time.


class TokenStore:
    """An open token store.

    Attributes:
        path: The folder.
        meta: What `meta.json` says.
        tokens: `(num_tokens,)` ids.
        documents: `(num_documents + 1,)` int64: document `i` is `tokens[documents[i] :
            documents[i + 1]]`.
        corrections: `(C,)`, `index` and `bytes`: the index of each token that stands for another
            number of bytes of text than the tokenizer says, ascending, and those bytes.
        problem: What was found to be wrong since the store was opened, see `store_guard`; None if
            nothing was.
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
        """Takes what `open` has read and checked."""
        self.path = path
        self.meta = meta
        self.tokens = tokens
        self.documents = documents
        self.corrections = corrections

    @classmethod
    def open(cls, path: str) -> "TokenStore":
        """Opens a store: checks the sizes of its files and the order of what points into them.

        That the bytes are those of the checksums is for `store_guard` to find out.

        Args:
            path: The folder.

        Returns:
            The store.

        Raises:
            ValueError: There is no store at `path`, or it is unreadable, truncated or damaged.
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
        """The open files, by their names."""
        files = {DOCUMENTS_FILE: self.documents, TOKENS_FILE: self.tokens}
        if isinstance(self.corrections, FileArray):
            files[CORRECTIONS_FILE] = self.corrections
        return files

    def check(self) -> None:
        """Raises `problem`, if there is one."""
        if self.problem is not None:
            raise self.problem

    def load_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that the store was written with.

        Raises:
            ValueError: The store's own `tokenizer.json` is not the one it was written with.
        """
        if self.meta.tokenizer == TOKENIZER_FILE:
            definition = inner_path(self.path, TOKENIZER_FILE)
            tokenizer = load_tokenizer(definition, self.meta.eod_token, self.meta.bos_token)
        else:
            tokenizer = load_tokenizer(self.meta.tokenizer)
        for name in ("fingerprint", "vocab_size", "eod_id", "eod_token", "bos_id", "bos_token"):
            found, said = getattr(tokenizer, name), getattr(self.meta, name)
            if found != said:
                raise ValueError(
                    f"the token store {self.path} is damaged: {META_FILE} says {name} "
                    f"{short_repr(said)}, its tokenizer {tokenizer.name} has "
                    f"{short_repr(found)}"
                )
        return tokenizer

    def count_text_bytes(self, start: int, stop: int, tokenizer: Tokenizer) -> int | None:
        """Counts the bytes of text that some neighbouring tokens stand for.

        Over all tokens it is `meta.text_bytes`; markers have none.

        Args:
            start: The index of the first token.
            stop: The index behind the last one.
            tokenizer: What `load_tokenizer` returned.

        Returns:
            Their bytes in UTF-8; None for a store of version 1 unless the tokenizer alone says it.
        """
        if self.meta.version == 1 and not tokenizer.is_lossless:
            return None
        ids = np.asarray(self.tokens[max(start - 1, 0) : stop], np.int64)
        # A token is the first of a text if a marker is in front of it.
        is_inside = np.zeros(ids.size, np.int64)
        is_inside[1:] = ids[:-1] != self.meta.bos_id
        sizes = tokenizer.token_bytes[is_inside, ids][ids.size - (stop - start) :]
        first, last = (
            bisect.bisect_left(self.corrections, place, key=lambda entry: entry["index"])
            for place in (start, stop)
        )
        corrected = self.corrections[first:last]
        sizes[corrected["index"] - start] = corrected["bytes"]
        return int(sizes.sum())


def check_same_tokenizer(stores: Sequence[TokenStore]) -> None:
    """Raises ValueError if the stores were written with different tokenizers."""
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
    """Returns what is equal only for the same tokenizer, though not always then."""
    return meta.fingerprint, meta.bos_token


def _read_meta(path: str) -> StoreMeta:
    """Reads `meta.json`; raises ValueError or OSError."""
    try:
        meta_path = inner_path(path, META_FILE)
        content = FileArray(meta_path, np.uint8)[: _MAX_META_BYTES + 1].tobytes()
        if len(content) > _MAX_META_BYTES:
            raise ValueError(f"it has more than {_MAX_META_BYTES:,} bytes")
        return StoreMeta.from_json(content.decode("utf-8"))
    except FileNotFoundError as error:
        if not os.path.isdir(path):
            raise ValueError(f"no token store at {path}: there is no such folder") from error
        raise ValueError(
            f"{path} is no token store, or one that was never finished: it has no {META_FILE};"
            f" {_text_hint(path)}"
        ) from error
    except NotADirectoryError as error:
        raise ValueError(f"{path} is a file, not a token store; {_text_hint(path)}") from error
    except ValueError as error:
        raise ValueError(f"cannot use the token store {path}: {META_FILE}: {error}") from error


def _text_hint(path: str) -> str:
    """Returns how to make a token store, in case the user names text instead of a store."""
    command = "./bazelw run //xlstm/tools:prepare_data -- --output=FOLDER"
    return f"to make a store of text, run: {command} --input={shlex.quote(path)}"


def _open_file(path: str, meta: StoreMeta, name: str, dtype: np.dtype) -> FileArray:
    """Opens a file of a store; raises ValueError if its size is not what `meta.json` says."""
    file = FileArray(inner_path(path, name), dtype)
    if file.num_bytes != meta.files[name]["bytes"]:
        raise ValueError(
            f"the token store {path} is truncated or damaged: {name} has {file.num_bytes} bytes, "
            f"{META_FILE} says {meta.files[name]['bytes']}"
        )
    return file


def _check_documents(path: str, meta: StoreMeta, documents: FileArray) -> None:
    """Raises ValueError if the documents do not lie one behind the other in all of the tokens."""
    problem = f"the first is {documents[0]}" if documents[0] else ""
    if not problem and documents[-1] != meta.num_tokens:
        problem = f"the last is {documents[-1]}"
    for first, offsets in [] if problem else _overlapping_pieces(documents):
        falls = np.flatnonzero(offsets[1:] <= offsets[:-1])
        if falls.size:
            number = int(falls[0])
            problem = f"document {first + number:,} would run from {offsets[number]} to"
            problem = f"{problem} {offsets[number + 1]}"
            break
    if problem:
        raise ValueError(
            f"the token store {path} is damaged: the offsets in {DOCUMENTS_FILE} do not run from 0 "
            f"to {meta.num_tokens} in rising order ({problem})"
        )


def _check_corrections(path: str, meta: StoreMeta, corrections: FileArray | np.ndarray) -> None:
    """Raises ValueError if the corrections do not point to tokens in rising order."""
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
                f"expected tokens from 0 to {meta.num_tokens - 1} in rising order and 0 to "
                f"{meta.text_bytes} bytes"
            )


def _overlapping_pieces(array: FileArray | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields where pieces begin, and the pieces: each with the first element of the next."""
    for first in range(0, len(array), _PIECE):
        yield first, array[first : first + _PIECE + 1]
