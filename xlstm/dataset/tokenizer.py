"""Tokenizers: text to token ids and back.

Two kinds: `byte` (an id is a UTF-8 byte; needs no file) and a `tokenizer.json` of the `tokenizers`
library. Both have an end-of-document marker, which stands in front of every document of a token
store and of every prompt; `encode` never yields it.
"""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable

import numpy as np
import tokenizers

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        name: "byte", or the path of the `tokenizer.json`.
        vocab_size: Every id is below it.
        eod_id: The id of the end-of-document marker.
        eod_token: How the marker is written in the tokenizer's vocabulary.
        fingerprint: Equal for two tokenizers exactly if they turn text into the same ids.
        definition: The content of the `tokenizer.json`; None where the name says everything.
    """

    name: str
    vocab_size: int
    eod_id: int
    eod_token: str
    fingerprint: str
    definition: bytes | None

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type, 8 to 32 bits, that holds every id."""
        return smallest_dtype(self.vocab_size)

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Turns a text into ids `(T,)` of the tokenizer's `dtype`, without any marker.

        Raises:
            ValueError: The text holds a lone surrogate, which no UTF-8 text can.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids back into text; what is not valid UTF-8 becomes U+FFFD, markers vanish."""

    @abc.abstractmethod
    def count_bytes(self, ids: np.ndarray) -> int:
        """Counts the UTF-8 bytes of the text that ids `(T,)` stand for; markers have none."""


class ByteTokenizer(Tokenizer):
    """An id is a UTF-8 byte. The marker is NUL; NULs in a text, which say nothing, are left out."""

    name = "byte"
    vocab_size = 256
    eod_id = 0
    eod_token = "\0"
    fingerprint = "byte"
    definition = None

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        ids = np.frombuffer(_utf8(text), np.uint8)
        return ids[ids != self.eod_id]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if i != self.eod_id]
        return bytes(kept).decode("utf-8", errors="replace")

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer.count_bytes`."""
        return int(np.count_nonzero(ids != self.eod_id))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    Markers that are spelled out in a text are taken as ordinary text, so that no document can end
    another; where the vocabulary cannot spell them, they are left out. Truncation and padding that
    the file may ask for are off.
    """

    def __init__(self, definition: bytes, name: str, eod_token: str | None = None):
        """Reads the content of a `tokenizer.json`.

        Args:
            definition: The content.
            name: The file's path, or what else to call it.
            eod_token: The marker's entry in the vocabulary; by default the first of `EOD_TOKENS`
                that the vocabulary has.

        Raises:
            ValueError: It cannot be parsed, or has no such marker.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # The library raises plain `Exception`s.
            raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
        self.definition = definition
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.name = name
        self.eod_token, self.eod_id = _find_eod(inner, name, eod_token)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.sha256(self.definition + self.eod_token.encode())
        self.fingerprint = f"sha256:{digest.hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        _utf8(text)  # The library's own complaint about lone surrogates is not a ValueError.
        ids = np.asarray(self._inner.encode(text, add_special_tokens=False).ids, self.dtype)
        return ids[ids != self.eod_id]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if i != self.eod_id]
        return self._inner.decode(kept, skip_special_tokens=True)

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer.count_bytes`.

        It is exact for byte-level vocabularies. Others are asked for the text, and that of a piece
        may miss a space in front of it, or a character that it cuts.
        """
        if self._token_bytes is None:
            return len(self.decode(ids).encode("utf-8"))
        return int(self._token_bytes[ids].sum())

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray | None:
        """`(V,)`, the bytes of each token; None unless the vocabulary is byte-level."""
        if not isinstance(self._inner.decoder, tokenizers.decoders.ByteLevel):
            return None
        # There a character of a token stands for a byte, unless it was added as it is.
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._inner.get_vocab(with_added_tokens=True).items():
            sizes[token_id] = len(token) if alphabet.issuperset(token) else len(_utf8(token))
        for token_id, token in self._inner.get_added_tokens_decoder().items():
            if token.special:
                sizes[token_id] = 0
        sizes[self.eod_id] = 0
        return sizes


def load_tokenizer(name_or_path: str, eod_token: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name_or_path: "byte", or the path of a `tokenizer.json` (or of a folder that holds one).
        eod_token: Which entry of the vocabulary is the end-of-document marker; not for "byte",
            whose marker is NUL. By default the `eos_token` of a `tokenizer_config.json` beside the
            file, or else the first of `EOD_TOKENS` that the vocabulary has.

    Returns:
        The tokenizer.

    Raises:
        ValueError: No such tokenizer, not readable, or without an end-of-document marker.
    """
    if name_or_path == ByteTokenizer.name:
        if eod_token not in (None, ByteTokenizer.eod_token):
            raise ValueError(f"the byte tokenizer's marker is NUL and cannot be {eod_token!r}")
        return ByteTokenizer()
    if os.path.isdir(name_or_path):
        name_or_path = os.path.join(name_or_path, TOKENIZER_FILE)
    if not os.path.exists(name_or_path):
        raise ValueError(
            f"no tokenizer {name_or_path!r}: give 'byte' or the path of a tokenizer.json"
        )
    try:
        with open(name_or_path, "rb") as file:
            definition = file.read()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {name_or_path}: {error.strerror}") from error
    return JsonTokenizer(definition, name_or_path, eod_token or _configured_eod(name_or_path))


def _configured_eod(path: str) -> str | None:
    """The `eos_token` of the file that public models have beside their `tokenizer.json`."""
    config_path = os.path.join(os.path.dirname(path), TOKENIZER_CONFIG_FILE)
    try:
        with open(config_path, encoding="utf-8") as file:
            token = json.load(file).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_path} cannot be used: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise ValueError(f"{config_path} has eos_token={token!r}: expected a text")
    return token


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest little-endian unsigned type that holds the ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def _find_eod(inner: tokenizers.Tokenizer, path: str, token: str | None) -> tuple[str, int]:
    """Finds the end-of-document marker: the one asked for, or else the first usual one."""
    candidates = EOD_TOKENS if token is None else (token,)
    for candidate in candidates:
        token_id = inner.token_to_id(candidate)
        if token_id is not None:
            return candidate, token_id
    looked_for = ", ".join(repr(candidate) for candidate in candidates)
    raise ValueError(f"{path} has no end-of-document token (looked for {looked_for}): name one")


def _utf8(text: str) -> bytes:
    """Returns the text's UTF-8 bytes; raises ValueError where it has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}), which is not valid Unicode"
        ) from error
