"""Tokenizers in a `tokenizer.json`, with the number of text bytes of every token."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tokenizers

from xlstm.dataset.base_tokenizer import (
    EncodedTexts,
    TokenizationError,
    Tokenizer,
    check_nothing_dropped,
    encode_utf8,
)
from xlstm.dataset.token_pieces import TokenPieces, components, has_component, token_pieces
from xlstm.dataset.tokenizer_definition import (
    adds_prefix_space,
    check_added_tokens,
    has_all_bytes,
    matches_byte_tokens,
    may_drop_characters,
    span_byte_counts,
    with_unknown_token,
    without_prefix,
)
from xlstm.visible_text import short_repr

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_MOST_IDS_PER_TOKEN = 100
_PROBE_TOKEN = "\ufffe nothing"
_Result = TypeVar("_Result")
_NOTHING = np.zeros(0, np.int64)
_BYTE_TOKENS = "<(?=0x[0-9A-Fa-f]{2}>)"  # Byte tokens that a document spells out.


class JsonTokenizer(Tokenizer):
    """A tokenizer defined by a `tokenizer.json`.

    A special token that is spelled out in a text is encoded as ordinary text, so that no document
    can end another. Truncation, padding and dropout are off, whatever the file says.
    """

    def __init__(
        self,
        definition: bytes,
        name: str,
        eod_token: str | None = None,
        bos_token: str | None = None,
        *,
        parsed: tokenizers.Tokenizer | None = None,
    ):
        """Sets the tokenizer up.

        Args:
            definition: The content of a `tokenizer.json`.
            name: The path of the file, or another name for messages.
            eod_token: The vocabulary entry of the marker after documents; by default, the first of
                `EOD_TOKENS` in the vocabulary.
            bos_token: The vocabulary entry of the marker before documents; by default, the same.
            parsed: The result of `parse_tokenizer` for `definition`, if there is one; it is
                modified.

        Raises:
            ValueError: The content cannot be parsed or is not supported, or a marker is missing.
        """
        self.name, self.definition = name, definition
        inner = parse_tokenizer(definition, name) if parsed is None else parsed
        # Serialized by the library, the definition has all fields; older files lack some.
        self._definition = json.loads(inner.to_str())
        check_added_tokens(inner, self._definition, name)
        self.eod_token, self.eod_id = _find_token(inner, name, "end", eod_token, EOD_TOKENS)
        usual = (self.eod_token,)
        self.bos_token, self.bos_id = _find_token(inner, name, "beginning", bos_token, usual)
        # The library would find a marker in texts if it were not a special token.
        for entry in self._definition["added_tokens"]:
            if entry["content"] in (self.eod_token, self.bos_token) and not entry["special"]:
                entry["special"] = True
                inner = tokenizers.Tokenizer.from_str(json.dumps(self._definition))
        self._inner = _prepared(inner)
        digest = hashlib.sha256(definition + self.eod_token.encode())
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._tokens = {token_id: token for token, token_id in vocab.items()}
        self._unknown_id = _unknown_id(self._definition["model"], vocab)
        # The library may assign other ids than the file says.
        added = self._inner.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self._special_ids |= {self.eod_id, self.bos_id}
        # Ids that no text may encode to; the unknown token is allowed.
        self._is_forbidden = np.zeros(self.vocab_size, bool)
        self._is_forbidden[list(self._special_ids - {self._unknown_id})] = True
        self._is_forbidden[[self.eod_id, self.bos_id]] = True
        self._may_drop_characters = may_drop_characters(self._definition)
        self._has_unknown = self._may_drop_characters or self._unknown_id is not None
        self._has_unknown &= not has_all_bytes(self._definition)
        self._adds_prefix_space = adds_prefix_space(self._definition)
        self._spells_bytes = matches_byte_tokens(self._definition["model"])
        self._variant = functools.cache(self._make_variant)
        self._cannot_encode = f"the tokenizer {name} cannot encode the text"

    @functools.cached_property
    def pieces(self) -> TokenPieces:
        """See `Tokenizer.pieces`."""
        return call_library(token_pieces, self._inner, self._definition, self._special_ids)

    @functools.cached_property
    def token_byte_counts(self) -> np.ndarray:
        """See `Tokenizer.token_byte_counts`."""
        tables = [self.pieces.first, self.pieces.middle]
        return np.array([[len(piece) for piece in table] for table in tables], np.int64)

    @functools.cached_property
    def identity(self) -> str:
        """See `Tokenizer.identity`; it ignores the layout of the file and the order of fields."""
        content = json.dumps(json.loads(self._inner.to_str()), sort_keys=True)
        digest = hashlib.sha256(content.encode())
        return f"{digest.hexdigest()} {self.bos_id} {self.eod_id}"

    @functools.cached_property
    def is_lossless(self) -> bool:
        """See `Tokenizer.is_lossless`: true for byte-level vocabularies that prepend nothing."""
        definition = self._definition
        strips = any(entry["lstrip"] or entry["rstrip"] for entry in definition["added_tokens"])
        kinds = {part["type"] for part in components(definition["pre_tokenizer"])}
        model = definition["model"]
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        return (
            has_component(definition["decoder"], "ByteLevel")
            and "ByteLevel" in kinds <= {"Sequence", "ByteLevel"}
            and model["type"] == "BPE"
            and has_all_bytes(definition)
            and not (definition["normalizer"] or self._adds_prefix_space or strips)
            and not any(model[affix] for affix in affixes)
        )

    def id_to_token(self, token_id: int) -> str:
        """See `Tokenizer.id_to_token`."""
        return self._tokens.get(token_id, f"id {token_id}")

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """See `Tokenizer.encode_batch`."""
        return self._encode_batch(texts, is_continuation=False)

    def encode_continuation(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_continuation`."""
        encoded = self._encode_batch([text], is_continuation=True)
        check_nothing_dropped(self.name, encoded)
        return encoded.ids

    def _encode_batch(self, texts: Sequence[str], *, is_continuation: bool) -> EncodedTexts:
        """Encodes all texts fast, then exactly those whose bytes do not add up."""
        text_bytes = np.array([len(encode_utf8(text, i)) for i, text in enumerate(texts)], np.int64)
        found, corrected, corrected_bytes, dropped = [], [], [], {}
        num_unknown, position = 0, 0
        encodings = self._encode_all(self._variant(is_continuation), texts)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids = np.array(encoding.ids, np.int64)
            account = self._account_for(text, encoding, ids, int(text_bytes[i]))
            if account is None:
                try:
                    exact = self._encode_exactly(text, is_continuation, encoding)
                except LibraryError as error:
                    raise TokenizationError(f"{self._cannot_encode}: {error}", i) from error
                ids, *account, missing = exact
                if missing:
                    dropped[i] = missing
            changed, sizes = account
            corrected.append(changed + position)
            corrected_bytes.append(sizes)
            num_unknown += np.count_nonzero(ids == self._unknown_id)
            found.append(ids)
            position += ids.size
        return EncodedTexts(
            ids=np.concatenate([_NOTHING, *found]).astype(self.dtype),
            lengths=np.array([ids.size for ids in found], np.int64),
            text_bytes=text_bytes,
            corrected=np.concatenate([_NOTHING, *corrected]),
            corrected_bytes=np.concatenate([_NOTHING, *corrected_bytes]),
            num_unknown=int(num_unknown),
            dropped=dropped,
        )

    def _encode_all(
        self, inner: tokenizers.Tokenizer, texts: Sequence[str]
    ) -> list[tokenizers.Encoding]:
        """Encodes texts, with token offsets if they are often needed."""
        encode = inner.encode_batch if self._has_unknown else inner.encode_batch_fast
        try:
            return call_library(encode, texts, add_special_tokens=False)
        except LibraryError as error:
            if len(texts) == 1:
                raise TokenizationError(f"{self._cannot_encode}: {error}") from error
        # The library does not say which text it failed on.
        encodings = []
        for i, text in enumerate(texts):
            try:
                encodings += self._encode_all(inner, [text])
            except TokenizationError as error:
                raise TokenizationError(str(error), i) from error
        return encodings

    def _account_for(
        self, text: str, encoding: tokenizers.Encoding, ids: np.ndarray, text_bytes: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Tries to account for all bytes of a text by `token_byte_counts`.

        Args:
            text: The text.
            encoding: The result of `_encode_all` for it.
            ids: Its ids.
            text_bytes: Its size in UTF-8.

        Returns:
            The indices of tokens whose number of bytes differs from `token_byte_counts` (unknown
            ones, or the first one), and their bytes. None if the bytes do not add up to the text,
            or a token is special.
        """
        is_unclear = self._may_drop_characters or (self._spells_bytes and "<0x" in text)
        if is_unclear or self._is_forbidden[ids].any():
            return None
        unknown = np.flatnonzero(ids == self._unknown_id)
        if unknown.size and not (self._has_unknown and self._tokens[self._unknown_id] not in text):
            return None
        sizes = self._count_bytes(ids)
        if not unknown.size and sizes.sum() == text_bytes:  # The common case.
            return _NOTHING, _NOTHING
        for i in unknown.tolist():
            start, stop = encoding.token_to_chars(i)
            sizes[i] = len(text[start:stop].encode())
        rest = text_bytes - int(sizes.sum())
        if rest and ids.size and not np.array_equal(unknown[:1], [0]):
            # The first token's space is part of the text, or was prepended and is counted.
            if text.startswith(" "):
                change = int(self.token_byte_counts[1][ids[0]]) - int(sizes[0])
            else:
                change = -int(self._adds_prefix_space)
            sizes[0] += change
            rest -= change
        if rest:
            return None
        changed = np.flatnonzero(sizes != self._count_bytes(ids))
        return changed, sizes[changed]

    def _count_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns the number of bytes of each token of a text, by `token_byte_counts`."""
        sizes = self.token_byte_counts[1][ids]
        sizes[:1] = self.token_byte_counts[0][ids[:1]]
        return sizes

    def _encode_exactly(
        self, text: str, is_continuation: bool, encoding: tokenizers.Encoding
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Encodes a text with token offsets and without special tokens.

        Args:
            text: The text.
            is_continuation: Whether it continues another one.
            encoding: The result of `_encode_all` for it.

        Returns:
            The ids; the indices of tokens whose number of bytes differs from `token_byte_counts`,
            and their bytes; the characters without a token.
        """
        spells_special = self._is_forbidden[encoding.ids].any()
        if self._definition["model"]["type"] != "BPE" and self._unknown_id is not None:
            # Models other than BPE match the unknown token in a text, like any other token.
            spells_special |= self._tokens[self._unknown_id] in text
        spells_bytes = self._spells_bytes and "<0x" in text
        if spells_special or spells_bytes or not self._has_unknown:
            inner = self._variant(is_continuation, spells_special, spells_bytes)
            encoding = call_library(inner.encode, text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        kept = ~self._is_forbidden[ids]
        # A special token of one character has no other spelling, so its character is dropped.
        missing = "".join(text[start:end] for start, end in spans[~kept])
        if self._may_drop_characters:
            missing += self._characters_without_token(text)
        ids, expected = ids[kept], self._count_bytes(ids[kept])
        sizes = span_byte_counts(text, spans[kept], expected)
        changed = np.flatnonzero(sizes != expected)
        return ids, changed, sizes[changed], missing

    def _characters_without_token(self, text: str) -> str:
        """Returns the characters of a text that the model drops, in order and with repetitions."""
        encoding = call_library(self._probe.encode, text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        # A prepended token has the offsets of the first character, which has its own token.
        is_prefix = len(ids) > 1 and spans[0][0] == spans[1][0]
        missing = [
            text[start:end]
            for i, (start, end) in zip(ids, spans, strict=True)
            if i == self._probe_id
        ]
        return "".join(missing[is_prefix and ids[0] == self._probe_id :])

    @functools.cached_property
    def _probe(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but with an unknown token for each character that it drops."""
        definition = with_unknown_token(self._definition, _PROBE_TOKEN)
        return _prepared(tokenizers.Tokenizer.from_str(json.dumps(definition)))

    @functools.cached_property
    def _probe_id(self) -> int:
        return self._probe.token_to_id(_PROBE_TOKEN)

    def _make_variant(
        self, is_continuation: bool, spells_special: bool = False, spells_bytes: bool = False
    ) -> tokenizers.Tokenizer:
        """Makes a variant of the tokenizer for texts that need it.

        Args:
            is_continuation: Whether to prepend nothing to a text.
            spells_special: Whether to split special tokens that the text spells out, so that the
                model matches only their parts.
            spells_bytes: Whether to split byte tokens that the text spells out.

        Returns:
            A tokenizer of the library.
        """
        if not (is_continuation or spells_special or spells_bytes):
            return self._inner
        definition = self._definition
        if is_continuation:
            definition = without_prefix(definition)
        inner = _prepared(tokenizers.Tokenizer.from_str(json.dumps(definition)))
        patterns = [_BYTE_TOKENS] if spells_bytes else []
        for token in sorted(self._tokens[i] for i in self._special_ids if spells_special):
            # Some models write spaces as "▁".
            for written in sorted({token, token.replace(" ", "▁")}):
                first, rest = re.escape(written[:1]), re.escape(written[1:])
                patterns += [f"{first}(?={rest})"] if rest else []
        if patterns:
            pattern = tokenizers.Regex("|".join(patterns))
            split = tokenizers.pre_tokenizers.Split(pattern, "isolated")
            parts = [inner.pre_tokenizer, split] if inner.pre_tokenizer else [split]
            inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
        return inner


class LibraryError(ValueError):
    """An error of the `tokenizers` library."""


def call_library(function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Calls the `tokenizers` library, and raises all of its errors as LibraryError."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit):
        raise
    # A panic is not an `Exception`, and it cannot be pickled.
    except BaseException as error:
        raise LibraryError(str(error)) from None


def parse_tokenizer(definition: bytes, name: str) -> tokenizers.Tokenizer:
    """Parses a `tokenizer.json`; raises ValueError, with its name, if that is impossible."""
    try:
        inner = call_library(tokenizers.Tokenizer.from_str, definition.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
    # The library's lists and our tables have an entry for every id up to the largest one.
    vocab = inner.get_vocab(with_added_tokens=True)
    largest = max(vocab, key=vocab.get, default=None)
    if vocab and vocab[largest] > _MOST_IDS_PER_TOKEN * len(vocab):
        raise ValueError(
            f"{name} has {len(vocab):,} tokens, and {short_repr(largest)} has the id"
            f" {vocab[largest]:,}: expected ids from 0 on, with few gaps"
        )
    return inner


def _prepared(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Switches off truncation, padding, post-processing and dropout."""
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    inner.post_processor = None
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    return inner


def _find_token(
    inner: tokenizers.Tokenizer, path: str, what: str, token: str | None, usual: Sequence[str]
) -> tuple[str, int]:
    """Finds a document marker: the given token, or else the first usual one."""
    candidates = usual if token is None else (token,)
    for candidate in candidates:
        token_id = inner.token_to_id(candidate)
        if token_id is not None:
            return candidate, token_id
    looked_for = ", ".join(repr(candidate) for candidate in candidates)
    raise ValueError(
        f"{path} has no {what}-of-document token (looked for {looked_for}): give its name"
    )


def _unknown_id(model: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Returns the id of the unknown token, or None."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return vocab.get(model.get("unk_token"))
