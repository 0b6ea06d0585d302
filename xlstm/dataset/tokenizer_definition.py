"""What the parsed content of a `tokenizer.json` says of the text that its tokens stand for."""

import collections
import copy
from typing import Any

import numpy as np
import tokenizers

from xlstm.dataset.token_pieces import byte_letters, components, has_component


def adds_space(definition: dict[str, Any]) -> bool:
    """Returns whether a byte-level tokenizer puts a space in front of texts."""
    parts = components(definition.get("pre_tokenizer"))
    return any(x["type"] == "ByteLevel" and x.get("add_prefix_space", True) for x in parts)


def without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """Returns a definition that puts nothing in front of a text, but else turns it into the same.

    Where words are cut at spaces first, what is in front of each of them stays.
    """
    definition = copy.deepcopy(definition)
    normalizer = definition.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        definition["normalizer"] = None
    for part in components(definition.get("normalizer")):
        if "normalizers" in part:
            part["normalizers"] = [x for x in part["normalizers"] if x["type"] != "Prepend"]
    first = next(
        (x for x in components(definition["pre_tokenizer"]) if x["type"] != "Sequence"), {}
    )
    if first.get("type") == "Metaspace":
        first["prepend_scheme"] = "never"
        first.pop("add_prefix_space", None)
    elif first.get("type") == "ByteLevel":
        first["add_prefix_space"] = False
    return definition


def may_leave_out(definition: dict[str, Any]) -> bool:
    """Returns whether characters may have no token, not even one that stands for the unknown."""
    model = definition["model"]
    if model["type"] != "BPE" or model.get("unk_token") in model["vocab"]:
        return False
    return not has_all_bytes(definition)


def has_all_bytes(definition: dict[str, Any]) -> bool:
    """Returns whether every byte has a token, so that nothing is unknown."""
    model = definition["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return False
    vocab = dict(model["vocab"])
    if _is_byte_level(definition):
        return vocab.keys() >= byte_letters().keys()
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    return bool(model.get("byte_fallback")) and vocab.keys() >= byte_tokens


def characters_without_token(
    inner: tokenizers.Tokenizer, definition: dict[str, Any], text: str
) -> str:
    """Finds the characters of a text that a BPE without an unknown token leaves out.

    Args:
        inner: The tokenizer.
        definition: Its definition, with a model of type BPE.
        text: The text.

    Returns:
        Those characters, as the normalizer has them, each as often as it occurs.
    """
    for entry in definition.get("added_tokens") or ():
        if not entry["special"]:
            text = text.replace(entry["content"], "")
    vocab = definition["model"]["vocab"]
    if _is_byte_level(definition):
        letters = {byte: letter for letter, byte in byte_letters().items()}
        known = {c for c in set(text) if all(letters[byte] in vocab for byte in c.encode())}
        return "".join(c for c in text if c not in known)
    normalized = inner.normalizer.normalize_str(text) if inner.normalizer else text
    words = [normalized]
    if inner.pre_tokenizer:
        words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(normalized)]
    counts = collections.Counter(words)
    missing = {word: _left_out_of_word(word, definition["model"]) for word in counts}
    return "".join(missing[word] * count for word, count in counts.items())


def _left_out_of_word(word: str, model: dict[str, Any]) -> str:
    """Returns the characters of a word for which a BPE has no token to begin its merges with."""
    vocab = model["vocab"]
    if model.get("ignore_merges") and word in vocab:
        return ""
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    missing = ""
    for i, character in enumerate(word):
        token = (prefix if i else "") + character + (suffix if i == len(word) - 1 else "")
        byte_tokens = [f"<0x{byte:02X}>" for byte in token.encode()]
        has_bytes = model.get("byte_fallback") and all(x in vocab for x in byte_tokens)
        missing += "" if token in vocab or has_bytes else character
    return missing


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return any(
        has_component(definition.get(x), "ByteLevel") for x in ("pre_tokenizer", "normalizer")
    )


def bytes_of_spans(text: str, spans: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Counts the bytes of a text that each token stands for, by its place in the text.

    Args:
        text: The text.
        spans: `(T, 2)` int64, the first character of each token and the one behind its last.
        expected: `(T,)` int64, the bytes that each token should have: kept where tokens that share
            characters have as many together.

    Returns:
        `(T,)` int64, the bytes of each token; together, all bytes of the text. What lies between
        tokens belongs to the one behind it, or at the end to the last.
    """
    if not len(spans):
        return expected
    # Their offsets as bytes; a token may begin before the end of the one before it.
    widths = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    ends = np.maximum.accumulate(spans[:, 1])
    if expected[0] == 0:  # What was put in front; its place is that of the first character.
        ends[0] = 0
    ends[-1] = len(text)
    sizes = np.diff(offsets[ends], prepend=0)
    is_start = np.concatenate([[True], spans[1:, 0] >= ends[:-1]])
    starts = np.flatnonzero(is_start)
    agree = np.add.reduceat(sizes, starts) == np.add.reduceat(expected, starts)
    return np.where(agree[np.cumsum(is_start) - 1], expected, sizes)
