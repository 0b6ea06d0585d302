"""A `tokenizer.json` of the `tokenizers` library, whose every byte of text is accounted for."""

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
    TextError,
    Tokenizer,
    check_nothing_left_out,
    utf8,
)
from xlstm.dataset.token_pieces import TokenPieces, components, has_component, token_pieces
from xlstm.dataset.tokenizer_definition import (
    adds_space,
    bytes_of_spans,
    check_added_tokens,
    finds_byte_tokens,
    has_all_bytes,
    may_leave_out,
    with_unknown_token,
    without_prefix,
)
from xlstm.visible_text import short_repr

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_MOST_IDS_PER_TOKEN = 100
_PROBE_TOKEN = "\ufffe nothing"
_Result = TypeVar("_Result")
_NOTHING = np.zeros(0, np.int64)
_BYTE_TOKENS = "<(?=0x[0-9A-Fa-f]{2}>)"  # As a document may spell them out.


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`.

    Special tokens that are spelled out in a text are taken as ordinary text, so that no document
    can end another. Truncation, padding and dropout that the file may ask for are off.
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
        """Reads the content of a `tokenizer.json`.

        Args:
            definition: The content.
            name: The file's path, or what else to call it.
            eod_token: The entry in the vocabulary of the marker behind documents; by default the
                first of `EOD_TOKENS` that the vocabulary has.
            bos_token: That of the marker in front of documents; by default the same.
            parsed: What `parse_tokenizer` returned for the content, if it was called before; it is
                changed.

        Raises:
            ValueError: It cannot be parsed or used, or has no such markers.
        """
        self.name, self.definition = name, definition
        inner = parsed or parse_tokenizer(definition, name)
        # As the library writes it: with all fields, which older files lack.
        self._definition = json.loads(inner.to_str())
        check_added_tokens(inner, self._definition, name)
        self.eod_token, self.eod_id = _find_token(inner, name, "end", eod_token, EOD_TOKENS)
        usual = (self.eod_token,)
        self.bos_token, self.bos_id = _find_token(inner, name, "beginning", bos_token, usual)
        # A marker that is an added token like others would be found in texts.
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
        # Ids in the file are not always those that the library gives.
        added = self._inner.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self._special_ids |= {self.eod_id, self.bos_id}
        # Ids that no text may have; an unknown token is what it is.
        self._is_forbidden = np.zeros(self.vocab_size, bool)
        self._is_forbidden[list(self._special_ids - {self._unknown_id})] = True
        self._is_forbidden[[self.eod_id, self.bos_id]] = True
        self._may_leave_out = may_leave_out(self._definition)
        self._has_unknown = self._may_leave_out or self._unknown_id is not None
        self._has_unknown &= not has_all_bytes(self._definition)
        self._adds_space = adds_space(self._definition)
        self._spells_bytes = finds_byte_tokens(self._definition["model"])
        self._variant = functools.cache(self._make_variant)
        self._cannot_encode = f"the tokenizer {name} cannot encode the text"

    @functools.cached_property
    def pieces(self) -> TokenPieces:
        """See `Tokenizer`."""
        return call(token_pieces, self._inner, self._definition, self._special_ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        tables = [self.pieces.first, self.pieces.middle]
        return np.array([[len(piece) for piece in table] for table in tables], np.int64)

    @functools.cached_property
    def identity(self) -> str:
        """See `Tokenizer`. The layout of the file and the order of its fields do not matter."""
        content = json.dumps(json.loads(self._inner.to_str()), sort_keys=True)
        digest = hashlib.sha256(content.encode())
        return f"{digest.hexdigest()} {self.bos_id} {self.eod_id}"

    @functools.cached_property
    def is_lossless(self) -> bool:
        """See `Tokenizer`: a byte-level vocabulary that nothing stands in front of."""
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
            and not (definition["normalizer"] or self._adds_space or strips)
            and not any(model[affix] for affix in affixes)
        )

    def token(self, token_id: int) -> str:
        """See `Tokenizer.token`."""
        return self._tokens.get(token_id, f"id {token_id}")

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """See `Tokenizer.encode_batch`."""
        return self._encode_batch(texts, is_continuation=False)

    def encode_continuation(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_continuation`."""
        encoded = self._encode_batch([text], is_continuation=True)
        check_nothing_left_out(self.name, encoded)
        return encoded.ids

    def _encode_batch(self, texts: Sequence[str], *, is_continuation: bool) -> EncodedTexts:
        """Encodes the fast way, and again what that does not account for."""
        text_bytes = np.array([len(utf8(text, i)) for i, text in enumerate(texts)], np.int64)
        found, corrected, corrected_bytes, left_out = [], [], [], {}
        num_unknown, position = 0, 0
        encodings = self._encode_all(self._variant(is_continuation), texts)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids = np.array(encoding.ids, np.int64)
            account = self._account_for(text, encoding, ids, int(text_bytes[i]))
            if account is None:
                try:
                    exact = self._encode_exactly(text, is_continuation, encoding)
                except LibraryError as error:
                    raise TextError(f"{self._cannot_encode}: {error}", i) from error
                ids, *account, missing = exact
                if missing:
                    left_out[i] = missing
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
            left_out=left_out,
        )

    def _encode_all(
        self, inner: tokenizers.Tokenizer, texts: Sequence[str]
    ) -> list[tokenizers.Encoding]:
        """Encodes texts, with the place of each token where that is often needed."""
        encode = inner.encode_batch if self._has_unknown else inner.encode_batch_fast
        try:
            return call(encode, texts, add_special_tokens=False)
        except LibraryError as error:
            if len(texts) == 1:
                raise TextError(f"{self._cannot_encode}: {error}") from error
        # It does not say which one.
        encodings = []
        for i, text in enumerate(texts):
            try:
                encodings += self._encode_all(inner, [text])
            except TextError as error:
                raise TextError(str(error), i) from error
        return encodings

    def _account_for(
        self, text: str, encoding: tokenizers.Encoding, ids: np.ndarray, text_bytes: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Tries to find all bytes of a text in its tokens, by `token_bytes`.

        Args:
            text: The text.
            encoding: What `_encode_all` made of it.
            ids: Its ids.
            text_bytes: Its size.

        Returns:
            The indices of tokens that stand for another number of bytes than `token_bytes` says:
            unknown ones, or the first one; and their bytes. None if that does not make up the
            text, or a token is special.
        """
        is_unclear = self._may_leave_out or (self._spells_bytes and "<0x" in text)
        if is_unclear or self._is_forbidden[ids].any():
            return None
        unknown = np.flatnonzero(ids == self._unknown_id)
        if unknown.size and not (self._has_unknown and self._tokens[self._unknown_id] not in text):
            return None
        sizes = self._count_bytes(ids)
        if not unknown.size and sizes.sum() == text_bytes:  # Of most texts.
            return _NOTHING, _NOTHING
        for i in unknown.tolist():
            start, stop = encoding.token_to_chars(i)
            sizes[i] = len(text[start:stop].encode())
        rest = text_bytes - int(sizes.sum())
        if rest and ids.size and not np.array_equal(unknown[:1], [0]):
            # A space in front was there already, or was put there and is not left out.
            if text.startswith(" "):
                change = int(self.token_bytes[1][ids[0]]) - int(sizes[0])
            else:
                change = -int(self._adds_space)
            sizes[0] += change
            rest -= change
        if rest:
            return None
        changed = np.flatnonzero(sizes != self._count_bytes(ids))
        return changed, sizes[changed]

    def _count_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns the bytes of each token of a text by `token_bytes`."""
        sizes = self.token_bytes[1][ids]
        sizes[:1] = self.token_bytes[0][ids[:1]]
        return sizes

    def _encode_exactly(
        self, text: str, is_continuation: bool, encoding: tokenizers.Encoding
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Encodes a text with the place of each token in it, and without special tokens.

        Args:
            text: The text.
            is_continuation: Whether it continues another one.
            encoding: What `_encode_all` made of it.

        Returns:
            The ids; the indices of tokens that stand for another number of bytes than `token_bytes`
            says, and their bytes; the characters that no token stands for.
        """
        spells_special = self._is_forbidden[encoding.ids].any()
        if self._definition["model"]["type"] != "BPE" and self._unknown_id is not None:
            # Other models find it in a text as any other token.
            spells_special |= self._tokens[self._unknown_id] in text
        spells_bytes = self._spells_bytes and "<0x" in text
        if spells_special or spells_bytes or not self._has_unknown:
            inner = self._variant(is_continuation, spells_special, spells_bytes)
            encoding = call(inner.encode, text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        kept = ~self._is_forbidden[ids]
        # A special token of one character cannot be spelled in another way.
        missing = "".join(text[start:end] for start, end in spans[~kept])
        if self._may_leave_out:
            missing += self._characters_without_token(text)
        ids, expected = ids[kept], self._count_bytes(ids[kept])
        sizes = bytes_of_spans(text, spans[kept], expected)
        changed = np.flatnonzero(sizes != expected)
        return ids, changed, sizes[changed], missing

    def _characters_without_token(self, text: str) -> str:
        """Returns the characters of a text that the model leaves out, each as often as it does."""
        encoding = call(self._probe.encode, text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        # What was put in front has the place of the first character, which has its own token.
        is_prefix = len(ids) > 1 and spans[0][0] == spans[1][0]
        missing = [
            text[start:end]
            for i, (start, end) in zip(ids, spans, strict=True)
            if i == self._probe_id
        ]
        return "".join(missing[is_prefix and ids[0] == self._probe_id :])

    @functools.cached_property
    def _probe(self) -> tokenizers.Tokenizer:
        """The same tokenizer, with an unknown token in place of what it leaves out."""
        definition = with_unknown_token(self._definition, _PROBE_TOKEN)
        return _prepared(tokenizers.Tokenizer.from_str(json.dumps(definition)))

    @functools.cached_property
    def _probe_id(self) -> int:
        return self._probe.token_to_id(_PROBE_TOKEN)

    def _make_variant(
        self, is_continuation: bool, spells_special: bool = False, spells_bytes: bool = False
    ) -> tokenizers.Tokenizer:
        """Makes the tokenizer that encodes texts.

        Args:
            is_continuation: Whether nothing is to be put in front of a text.
            spells_special: Whether special tokens may be spelled out in the text: they are cut, so
                that the model finds their parts only.
            spells_bytes: Whether byte tokens may be.

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
            # Models that write spaces as "▁" find it written so.
            for written in sorted({token, token.replace(" ", "▁")}):
                first, rest = re.escape(written[:1]), re.escape(written[1:])
                patterns += [f"{first}(?={rest})"] if rest else []
        if patterns:
            pattern = tokenizers.Regex("|".join(patterns))
            cut = tokenizers.pre_tokenizers.Split(pattern, "isolated")
            parts = [inner.pre_tokenizer, cut] if inner.pre_tokenizer else [cut]
            inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
        return inner


class LibraryError(ValueError):
    """The `tokenizers` library failed."""


def call(function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Calls the `tokenizers` library, and turns whatever it raises into a LibraryError."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit):
        raise
    # Errors are plain `Exception`s; a panic is none, nor can another process be told of it.
    except BaseException as error:
        raise LibraryError(str(error)) from None


def parse_tokenizer(definition: bytes, name: str) -> tokenizers.Tokenizer:
    """Parses the content of a `tokenizer.json`; raises ValueError, with the name, if it cannot."""
    try:
        inner = call(tokenizers.Tokenizer.from_str, definition.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
    # The library makes lists of ids that are not there, and we make tables of all.
    vocab = inner.get_vocab(with_added_tokens=True)
    largest = max(vocab, key=vocab.get, default=None)
    if vocab and vocab[largest] > _MOST_IDS_PER_TOKEN * len(vocab):
        raise ValueError(
            f"{name} has {len(vocab):,} tokens, and {short_repr(largest)} has the id"
            f" {vocab[largest]:,}: expected ids from 0 on, with few gaps"
        )
    return inner


def _prepared(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Switches off what changes the ids of a text: its length, its markers and chance."""
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
    """Finds the marker at an end of documents: the one asked for, or else the first usual one."""
    candidates = usual if token is None else (token,)
    for candidate in candidates:
        token_id = inner.token_to_id(candidate)
        if token_id is not None:
            return candidate, token_id
    looked_for = ", ".join(repr(candidate) for candidate in candidates)
    raise ValueError(f"{path} has no {what}-of-document token (looked for {looked_for}): name one")


def _unknown_id(model: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Returns the id of the token for what the model does not know, or None."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return vocab.get(model.get("unk_token"))
