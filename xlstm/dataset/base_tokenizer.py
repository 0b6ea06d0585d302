"""The interface of tokenizers, and the byte tokenizer.

There are two kinds: `byte`, whose ids are UTF-8 bytes and which needs no file, and a
`tokenizer.json` of the `tokenizers` library. Both have document markers: tokens that delimit the
documents of a token store and start every prompt. No text encodes to them.
"""

import abc
import dataclasses
import os
from collections.abc import Iterable, Sequence

import numpy as np

from xlstm.dataset.detokenizer import DetokenizerState, StreamingDetokenizer
from xlstm.dataset.token_pieces import TokenPieces
from xlstm.files import read_file

TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class EncodedTexts:
    """The token ids of `N` texts.

    Attributes:
        ids: `(T,)`, the ids of all texts, concatenated.
        lengths: `(N,)` int64, the number of tokens of each text.
        text_bytes: `(N,)` int64, the size of each text in UTF-8.
        corrected: `(C,)` int64, ascending: the indices into `ids` of tokens whose number of bytes
            differs from `Tokenizer.token_byte_counts`.
        corrected_bytes: `(C,)` int64, the number of bytes of those tokens.
        num_unknown: The number of unknown tokens.
        dropped: The characters without a token, by the index of their text; a text without such
            characters has no entry.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    corrected: np.ndarray
    corrected_bytes: np.ndarray
    num_unknown: int
    dropped: dict[int, str]


class TokenizationError(ValueError):
    """An error for a text that cannot be encoded.

    Attributes:
        index: The index of the text in its batch.
    """

    def __init__(self, message: str, index: int = 0):
        """Takes the message and the index of the text."""
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        """Returns the message."""
        return self.args[0]


class Tokenizer(abc.ABC):
    """A tokenizer: converts text to token ids and back.

    Attributes:
        name: "byte", or the path of the `tokenizer.json`.
        vocab_size: The size of the id space; every id is below it.
        bos_id: The id of the marker before every document.
        bos_token: The vocabulary entry of that marker.
        eod_id: The id of the marker after every document. If it equals `bos_id`, a single marker
            separates two documents.
        eod_token: The vocabulary entry of that marker.
        fingerprint: A hash of the file and `eod_token`, which checkpoints record.
        definition: The content of the `tokenizer.json`; None for "byte".
        pieces: The bytes of text of each token.
        is_lossless: Whether the pieces of a text's tokens are exactly the bytes of the text, for
            every text: no character is changed, added or dropped.
    """

    name: str
    vocab_size: int
    bos_id: int
    bos_token: str
    eod_id: int
    eod_token: str
    fingerprint: str
    definition: bytes | None
    pieces: TokenPieces
    is_lossless: bool

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """A string that two tokenizers share exactly if they yield the same ids and markers."""

    @property
    @abc.abstractmethod
    def token_byte_counts(self) -> np.ndarray:
        """`(2, V)` int64: bytes of text of each token, [0] after a marker, [1] elsewhere."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """Encodes texts, without markers.

        Args:
            texts: The texts.

        Returns:
            The ids, and the bytes that they represent.

        Raises:
            TokenizationError: A text holds a lone surrogate, which UTF-8 cannot represent, or the
                library rejects it.
        """

    @abc.abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """Returns the vocabulary entry of an id."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type, 8 to 32 bits, that holds every id."""
        return smallest_dtype(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text to ids `(T,)` of `dtype`, without markers.

        Raises:
            ValueError: See `encode_batch`; or a character has no token.
        """
        encoded = self.encode_batch([text])
        check_nothing_dropped(self.name, encoded)
        return encoded.ids

    def encode_continuation(self, text: str) -> np.ndarray:
        """Encodes a text that continues another one; see `encode`.

        The ids differ only for tokenizers that prepend a space to every text.
        """
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text; invalid UTF-8 becomes U+FFFD, markers are skipped."""
        detokenizer = self.detokenizer()
        return detokenizer.add(int(i) for i in ids) + detokenizer.finish()

    def detokenizer(self, state: DetokenizerState | None = None) -> StreamingDetokenizer:
        """Returns a streaming detokenizer that starts a text, or continues from `state`."""
        return StreamingDetokenizer(self.pieces, state)


class ByteTokenizer(Tokenizer):
    """The tokenizer whose ids are UTF-8 bytes; its marker is NUL, so NULs have no token."""

    name = "byte"
    vocab_size = 256
    bos_id = eod_id = 0
    bos_token = eod_token = "\0"
    fingerprint = identity = "byte"
    definition = None
    pieces = TokenPieces(
        [byte > 0 for byte in range(256)],
        *([[b"", *(bytes([byte]) for byte in range(1, 256))]] * 3),
    )
    token_byte_counts = np.ones((2, 256), np.int64)
    token_byte_counts[:, eod_id] = 0
    is_lossless = True

    def id_to_token(self, token_id: int) -> str:
        """See `Tokenizer.id_to_token`."""
        return chr(token_id)

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """See `Tokenizer.encode_batch`."""
        contents = [encode_utf8(text, i) for i, text in enumerate(texts)]
        text_bytes = np.array([len(content) for content in contents], np.int64)
        dropped = {i: "\0" * x.count(b"\0") for i, x in enumerate(contents) if b"\0" in x}
        for i in dropped:
            contents[i] = contents[i].replace(b"\0", b"")
        lengths = np.array([len(content) for content in contents], np.int64)
        # The first token of a text accounts for its NULs, so that the sum over tokens is complete.
        starts, num_nuls = np.cumsum(lengths) - lengths, text_bytes - lengths
        is_corrected = (num_nuls > 0) & (lengths > 0)
        return EncodedTexts(
            ids=np.frombuffer(b"".join(contents), np.uint8),
            lengths=lengths,
            text_bytes=text_bytes,
            corrected=starts[is_corrected],
            corrected_bytes=1 + num_nuls[is_corrected],
            num_unknown=0,
            dropped=dropped,
        )


def check_nothing_dropped(name: str, encoded: EncodedTexts) -> None:
    """Raises a ValueError with examples if characters of the texts have no token."""
    if encoded.dropped:
        characters = list_characters("".join(encoded.dropped.values()))
        raise ValueError(f"the tokenizer {name} has no token for {characters}")


def list_characters(characters: str) -> str:
    """Returns a description of the distinct characters of a text, at most five."""
    different = list(dict.fromkeys(characters))
    listed = [f"{c!r} (U+{ord(c):04X})" for c in different[:5]]
    return ", ".join(listed) + (", ..." if len(different) > 5 else "")


def read_definition(path: str) -> bytes:
    """Returns the content of a `tokenizer.json`; raises ValueError if it cannot be read."""
    if not os.path.exists(path):
        raise ValueError(f"no tokenizer {path!r}: give 'byte' or the path of a tokenizer.json")
    try:
        return read_file(path)
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest little-endian unsigned type for the ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encode_utf8(text: str, index: int = 0) -> bytes:
    """Returns a text as UTF-8; raises TokenizationError, with the index, if it has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizationError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}), which is not valid Unicode",
            index,
        ) from error
