"""The token store: a folder that holds a tokenised corpus, opened by mapping it into memory.

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

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from xlstm.dataset.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    describe,
    load_tokenizer,
    same_tokenizer,
)

FORMAT = "xlstm token store"
VERSION = 2
META_FILE = "meta.json"
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.bin"
CORRECTIONS_FILE = "text_bytes.bin"
OFFSET_DTYPE = np.dtype("<i8")
_CORRECTION_BYTES = 2 * OFFSET_DTYPE.itemsize


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What `meta.json` says.

    Attributes:
        tokenizer: "byte", or "tokenizer.json" where the store holds the definition itself.
        fingerprint: The tokenizer's.
        vocab_size: The tokenizer's.
        eod_id: The tokenizer's.
        eod_token: The tokenizer's.
        bos_id: The tokenizer's.
        bos_token: The tokenizer's.
        dtype: Of `tokens.bin`, in NumPy's notation.
        num_documents: How many documents there are.
        num_tokens: How many tokens there are, markers included.
        text_bytes: The size of the text in UTF-8.
        files: For every other file of the store, its size in `bytes` and its `sha256`.
        version: That of the format.
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
        """Parses the text of `meta.json`; raises ValueError where it is not one of ours."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"it does not describe an {FORMAT}")
        version = fields.get("version")
        if version not in (1, VERSION):
            raise ValueError(f"it has format version {version}, this program reads 1 and {VERSION}")
        try:
            if version == 1:  # It had one marker for both.
                fields |= {"bos_id": fields["eod_id"], "bos_token": fields["eod_token"]}
            meta = cls(**fields)
            itemsize = np.dtype(meta.dtype).itemsize
            expected = {
                TOKENS_FILE: meta.num_tokens * itemsize,
                DOCUMENTS_FILE: (meta.num_documents + 1) * OFFSET_DTYPE.itemsize,
            }
            sizes = {name: meta.files[name]["bytes"] for name in expected}
            if not all(isinstance(file["sha256"], str) for file in meta.files.values()):
                raise TypeError("a checksum is no text")
            counts = (meta.vocab_size, meta.eod_id, meta.bos_id, meta.text_bytes)
            if not all(type(x) is int for x in counts):
                raise TypeError("a count is no integer")
            if meta.files.get(CORRECTIONS_FILE, {"bytes": 0})["bytes"] % _CORRECTION_BYTES:
                raise TypeError(f"{CORRECTIONS_FILE} has no whole entries")
        except (TypeError, KeyError) as error:
            raise ValueError(f"its fields are not those of version {version} ({error})") from error
        if sizes != expected or not meta.num_tokens > meta.num_documents > 0:
            raise ValueError("its counts and file sizes contradict each other")
        return meta


class TokenStore:
    """An open token store.

    Attributes:
        path: The folder.
        meta: What `meta.json` says.
        tokens: `(num_tokens,)` ids, mapped from the file.
        documents: `(num_documents + 1,)` int64: document `i` is `tokens[documents[i] :
            documents[i + 1]]`.
        corrections: `(C, 2)` int64: the index of each token that stands for another number of bytes
            of text than the tokenizer says, ascending, and those bytes.
    """

    def __init__(
        self,
        path: str,
        meta: StoreMeta,
        tokens: np.ndarray,
        documents: np.ndarray,
        corrections: np.ndarray,
    ):
        """Takes what `open` has read and checked."""
        self.path = path
        self.meta = meta
        self.tokens = tokens
        self.documents = documents
        self.corrections = corrections

    @classmethod
    def open(cls, path: str, *, verify: bool = False) -> "TokenStore":
        """Opens a store, checking the sizes of its files and the order of its documents.

        Args:
            path: The folder.
            verify: Also read all of it and compare the checksums.

        Returns:
            The store.

        Raises:
            ValueError: There is no store at `path`, or it is unreadable, truncated or damaged.
        """
        try:
            meta = _read_meta(path)
            for name, file in meta.files.items():
                _check_file(path, name, file, verify)
            tokens = np.memmap(os.path.join(path, TOKENS_FILE), np.dtype(meta.dtype), "r")
            documents = np.memmap(os.path.join(path, DOCUMENTS_FILE), OFFSET_DTYPE, "r")
            corrections = np.zeros((0, 2), np.int64)
            if CORRECTIONS_FILE in meta.files:
                mapped = np.memmap(os.path.join(path, CORRECTIONS_FILE), OFFSET_DTYPE, "r")
                corrections = mapped.reshape(-1, 2)
        except OSError as error:
            raise ValueError(f"cannot read {error.filename or path}: {error.strerror}") from error
        in_order = documents[0] == 0 and documents[-1] == meta.num_tokens
        if not in_order or not np.all(documents[:-1] < documents[1:]):
            raise ValueError(
                f"the token store {path} is damaged: the offsets in {DOCUMENTS_FILE} do not run "
                f"from 0 to {meta.num_tokens} in rising order"
            )
        return cls(path, meta, tokens, documents, corrections)

    def load_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that the store was written with.

        Raises:
            ValueError: The store's own `tokenizer.json` is not the one it was written with.
        """
        if self.meta.tokenizer == TOKENIZER_FILE:
            definition = os.path.join(self.path, TOKENIZER_FILE)
            tokenizer = load_tokenizer(definition, self.meta.eod_token, self.meta.bos_token)
        else:
            tokenizer = load_tokenizer(self.meta.tokenizer)
        if tokenizer.fingerprint != self.meta.fingerprint:
            raise ValueError(
                f"the token store {self.path} is damaged: its {tokenizer.name} has the fingerprint "
                f"{tokenizer.fingerprint}, {META_FILE} says {self.meta.fingerprint}"
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
        first, last = np.searchsorted(self.corrections[:, 0], (start, stop))
        corrected = self.corrections[first:last]
        sizes[corrected[:, 0] - start] = corrected[:, 1]
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
    meta_path = os.path.join(path, META_FILE)
    try:
        with open(meta_path, encoding="utf-8") as file:
            return StoreMeta.from_json(file.read())
    except FileNotFoundError as error:
        if not os.path.isdir(path):
            raise ValueError(f"no token store at {path}: there is no such folder") from error
        raise ValueError(
            f"{path} is no token store, or one that was never finished: it has no {META_FILE}"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot use the token store {path}: {META_FILE}: {error}") from error


def _check_file(path: str, name: str, expected: dict[str, Any], verify: bool) -> None:
    """Compares a file's size, and with `verify` its checksum, with what `meta.json` says."""
    file_path = os.path.join(path, name)
    size = os.path.getsize(file_path)
    if size != expected["bytes"]:
        raise ValueError(
            f"the token store {path} is truncated or damaged: {name} has {size} bytes, "
            f"{META_FILE} says {expected['bytes']}"
        )
    if verify:
        with open(file_path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected["sha256"]:
            raise ValueError(
                f"the token store {path} is damaged: the SHA-256 of {name} is {digest}, "
                f"{META_FILE} says {expected['sha256']}"
            )
