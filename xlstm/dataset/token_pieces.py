"""The bytes of text that each token of a `tokenizer.json` represents.

Decoding concatenates the bytes of the tokens and reads them as UTF-8. Where the bytes are valid,
the decoders of the `tokenizers` library yield the same text. Where they are not, the library
replaces more than the invalid bytes by U+FFFD, and its output depends on where a text is split.
Bytes have neither problem.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# An ordinary token: decoded next to another token, it shows what that token adds.
_ANCHOR = "a"
_DECODERS = {
    "BPEDecoder",
    "ByteFallback",
    "ByteLevel",
    "Fuse",
    "Metaspace",
    "Replace",
    "Sequence",
    "Strip",
    "WordPiece",
}


@dataclasses.dataclass(frozen=True)
class TokenPieces:
    """The bytes of each token, in lists of length `V`.

    Attributes:
        is_text: Whether the token has text; special tokens have none.
        first: Its bytes as the first token of a text, perhaps without a leading space.
        middle: Its bytes between two other tokens.
        last: Its bytes as the last token of a text: a prefix of `middle`.
    """

    is_text: list[bool]
    first: list[bytes]
    middle: list[bytes]
    last: list[bytes]


def components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a normalizer, pre-tokenizer, post-processor or decoder, and all nested components."""
    if part is not None:
        yield part
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            for inner in part.get(name, ()):
                yield from components(inner)


def has_component(part: dict[str, Any] | None, kind: str) -> bool:
    """Returns whether a part of a tokenizer is or contains a component of a type."""
    return any(component["type"] == kind for component in components(part))


def byte_of_token(token: str) -> int | None:
    """Returns the byte of a byte-fallback token such as `<0xE0>`, or None."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


@functools.cache
def byte_letters() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary represents."""
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # Printable bytes are their own letters; the others have letters above 255, in order.
    others = iter(sorted(letter for letter in alphabet if ord(letter) > 255))
    return {chr(b) if chr(b) in alphabet else next(others): b for b in range(256)}


def token_pieces(
    inner: tokenizers.Tokenizer, definition: dict[str, Any], special_ids: Collection[int]
) -> TokenPieces:
    """Returns the bytes of every token.

    Args:
        inner: The tokenizer.
        definition: Its parsed `tokenizer.json`.
        special_ids: The ids that have no text.

    Returns:
        The bytes of all ids up to the largest one; an id without a token has none.

    Raises:
        ValueError: The decoder does not decode token by token, or a token is ambiguous.
    """
    decoder = definition.get("decoder")
    unknown = {component["type"] for component in components(decoder)} - _DECODERS
    if unknown:
        raise ValueError(
            f"the decoder {unknown.pop()} is not supported: it does not decode token by token"
        )
    vocab = inner.get_vocab(with_added_tokens=True)
    tokens: list[str | None] = [None] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        if token_id not in special_ids:
            tokens[token_id] = token
    is_text = [token is not None for token in tokens]
    if has_component(decoder, "ByteLevel"):
        added = inner.get_added_tokens_decoder()
        contents = {i: token.content for i, token in added.items() if i not in special_ids}
        _check_added_tokens(contents, definition["model"])
        pieces = [_byte_level_piece(token, contents.get(i)) for i, token in enumerate(tokens)]
        return TokenPieces(is_text, pieces, pieces, pieces)
    has_bytes = has_component(decoder, "ByteFallback")
    found = [_pieces_of(token, inner.decoder, has_bytes) for token in tokens]
    return TokenPieces(is_text, *(list(column) for column in zip(*found, strict=True)))


def _byte_level_piece(token: str | None, content: str | None) -> bytes:
    """Returns the bytes of a token of a byte-level vocabulary, or of an added token."""
    if token is None:
        return b""
    letters = byte_letters()
    if content is not None or not letters.keys() >= set(token):
        return token.encode()
    return bytes(letters[letter] for letter in token)


def _check_added_tokens(contents: dict[int, str], model: dict[str, Any]) -> None:
    """Raises a ValueError if an added token may also be a token of a byte-level vocabulary."""
    vocab = dict(model["vocab"])
    unclear = {
        content
        for i, content in contents.items()
        if not content.isascii()
        and vocab.get(content) == i
        and byte_letters().keys() >= set(content)
    }
    if not unclear:
        return
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges", ()))
    made = {"".join(pair) for pair in merges} | byte_letters().keys()
    if model.get("ignore_merges"):
        made |= unclear
    if unclear & made:
        raise ValueError(
            f"the added token {min(unclear & made)!r} is also a token of the byte-level vocabulary,"
            " whose letters represent other bytes: the file does not say which of the two it is"
        )


def _pieces_of(
    token: str | None, decoder: tokenizers.decoders.Decoder | None, has_bytes: bool
) -> tuple[bytes, bytes, bytes]:
    """Returns the bytes of a token as the first, a middle and the last token of a text."""
    if token is None:
        return b"", b"", b""
    byte = byte_of_token(token) if has_bytes else None
    if byte is not None and byte >= 0x80:
        return (bytes([byte]),) * 3
    decode = decoder.decode if decoder else " ".join
    suffix = decode([_ANCHOR, _ANCHOR])[len(_ANCHOR) :]
    first = decode([token, _ANCHOR]).removesuffix(suffix)
    middle = decode([_ANCHOR, token, _ANCHOR])[len(_ANCHOR) :].removesuffix(suffix)
    last = decode([_ANCHOR, token])[len(_ANCHOR) :]
    return first.encode(), middle.encode(), last.encode()
