"""Tokenizers: text to token ids and back.

Two kinds: `byte` (an id is a UTF-8 byte; needs no file) and a `tokenizer.json` of the `tokenizers`
library. Both have markers, which stand around the documents of a token store and in front of every
prompt; no text yields them.
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
    """Some texts as token ids.

    Attributes:
        ids: `(T,)`, the ids of all texts, one behind the other.
        lengths: `(N,)` int64, tokens of each text.
        text_bytes: `(N,)` int64, the size of each text in UTF-8.
        corrected: `(C,)` int64, ascending: indices into `ids` of tokens that stand for another
            number of bytes than `Tokenizer.token_bytes` says.
        corrected_bytes: `(C,)` int64, their bytes.
        num_unknown: How many tokens say only that the tokenizer does not know something.
        left_out: The characters of each text that no token stands for, by the text's index; texts
            that are whole are not in it.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    corrected: np.ndarray
    corrected_bytes: np.ndarray
    num_unknown: int
    left_out: dict[int, str]


class TextError(ValueError):
    """A text cannot be encoded.

    Attributes:
        index: Which of the texts.
    """

    def __init__(self, message: str, index: int = 0):
        """Takes the message and the text's index among all."""
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        """Returns the message."""
        return self.args[0]


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        name: "byte", or the path of the `tokenizer.json`.
        vocab_size: Every id is below it.
        bos_id: The id of the marker in front of every document.
        bos_token: How that marker is written in the tokenizer's vocabulary.
        eod_id: The id of the marker behind every document. If it is the same as `bos_id`, one
            marker stands between two documents.
        eod_token: How that marker is written.
        fingerprint: Names the content of the file and `eod_token`, as checkpoints record it.
        definition: The content of the `tokenizer.json`; None where the name says everything.
        pieces: The bytes of text of each token.
        is_lossless: Whether the bytes of each token's piece are those of the text, whatever the
            text is: no character is changed, added or left out.
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
        """Equal for two tokenizers exactly if they turn text into the same ids and markers."""

    @property
    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """`(2, V)` int64: bytes of text of each token, [0] behind a marker, [1] elsewhere."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """Turns texts into ids, without any marker.

        Args:
            texts: The texts.

        Returns:
            Their ids, and what became of their bytes.

        Raises:
            TextError: A text holds a lone surrogate, which no UTF-8 text can, or something that
                the tokenizer refuses.
        """

    @abc.abstractmethod
    def token(self, token_id: int) -> str:
        """Returns how a token is written in the vocabulary."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type, 8 to 32 bits, that holds every id."""
        return smallest_dtype(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Turns a text into ids `(T,)` of the tokenizer's `dtype`, without any marker.

        Raises:
            ValueError: See `encode_batch`; or a character has no token.
        """
        encoded = self.encode_batch([text])
        check_nothing_left_out(self.name, encoded)
        return encoded.ids

    def encode_continuation(self, text: str) -> np.ndarray:
        """Turns a text that continues another one into ids; see `encode`.

        It differs for tokenizers that put a space in front of every text.
        """
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids back into text; what is not valid UTF-8 becomes U+FFFD, markers vanish."""
        detokenizer = self.detokenizer()
        return detokenizer.add(int(i) for i in ids) + detokenizer.finish()

    def detokenizer(self, state: DetokenizerState | None = None) -> StreamingDetokenizer:
        """Returns what turns ids into text while they come, from a state or from the beginning."""
        return StreamingDetokenizer(self.pieces, state)


class ByteTokenizer(Tokenizer):
    """An id is a UTF-8 byte. The marker is NUL, so NULs in a text have no token."""

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
    token_bytes = np.ones((2, 256), np.int64)
    token_bytes[:, eod_id] = 0
    is_lossless = True

    def token(self, token_id: int) -> str:
        """See `Tokenizer.token`."""
        return chr(token_id)

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """See `Tokenizer.encode_batch`."""
        contents = [utf8(text, i) for i, text in enumerate(texts)]
        text_bytes = np.array([len(content) for content in contents], np.int64)
        left_out = {i: "\0" * x.count(b"\0") for i, x in enumerate(contents) if b"\0" in x}
        for i in left_out:
            contents[i] = contents[i].replace(b"\0", b"")
        lengths = np.array([len(content) for content in contents], np.int64)
        # Each text's first token stands for its NULs too, so that no byte is missing in the sum.
        starts, num_nuls = np.cumsum(lengths) - lengths, text_bytes - lengths
        is_corrected = (num_nuls > 0) & (lengths > 0)
        return EncodedTexts(
            ids=np.frombuffer(b"".join(contents), np.uint8),
            lengths=lengths,
            text_bytes=text_bytes,
            corrected=starts[is_corrected],
            corrected_bytes=1 + num_nuls[is_corrected],
            num_unknown=0,
            left_out=left_out,
        )


def check_nothing_left_out(name: str, encoded: EncodedTexts) -> None:
    """Raises ValueError, with examples, if characters of the texts have no token."""
    if encoded.left_out:
        characters = list_characters("".join(encoded.left_out.values()))
        raise ValueError(f"the tokenizer {name} has no token for {characters}")


def list_characters(characters: str) -> str:
    """Returns the different characters of a text in words, at most five."""
    different = list(dict.fromkeys(characters))
    listed = [f"{c!r} (U+{ord(c):04X})" for c in different[:5]]
    return ", ".join(listed) + (", ..." if len(different) > 5 else "")


def read_definition(path: str) -> bytes:
    """Reads a `tokenizer.json`; raises ValueError if it cannot be read."""
    if not os.path.exists(path):
        raise ValueError(f"no tokenizer {path!r}: give 'byte' or the path of a tokenizer.json")
    try:
        return read_file(path)
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest little-endian unsigned type that holds the ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def utf8(text: str, index: int = 0) -> bytes:
    """Returns the UTF-8 bytes of a text of some index; raises TextError where it has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}), which is not valid Unicode",
            index,
        ) from error
