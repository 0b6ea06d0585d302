"""Queries and edits of the parsed content of a `tokenizer.json`, its "definition"."""

import copy
from typing import Any

import numpy as np
import tokenizers

from xlstm.dataset.token_pieces import byte_letters, components, has_component


def adds_prefix_space(definition: dict[str, Any]) -> bool:
    """Returns whether a byte-level tokenizer prepends a space to texts."""
    parts = components(definition.get("pre_tokenizer"))
    return any(x["type"] == "ByteLevel" and x.get("add_prefix_space", True) for x in parts)


def without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """Returns an otherwise equal definition that prepends nothing to a text.

    Where the text is split at spaces first, the prefixes of its words stay.
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


def may_drop_characters(definition: dict[str, Any]) -> bool:
    """Returns whether some characters have no token, not even the unknown token."""
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


def matches_byte_tokens(model: dict[str, Any]) -> bool:
    """Returns whether a model matches byte tokens, such as `<0x41>`, that a text spells out."""
    return bool(model.get("byte_fallback")) and (
        model["type"] == "Unigram" or bool(model.get("ignore_merges"))
    )


def with_unknown_token(definition: dict[str, Any], token: str) -> dict[str, Any]:
    """Returns the definition of a BPE with an unknown token for each character it would drop."""
    definition = copy.deepcopy(definition)
    model = definition["model"]
    model["vocab"][token] = max(model["vocab"].values(), default=-1) + 1
    model |= {"unk_token": token, "fuse_unk": False}
    return definition


def check_added_tokens(inner: tokenizers.Tokenizer, definition: dict[str, Any], name: str) -> None:
    """Checks that a tokenizer matches its added tokens, and does so deterministically.

    Args:
        inner: The tokenizer.
        definition: Its definition.
        name: Its name in messages.

    Raises:
        ValueError: A normalized added token is empty, for which the library would search forever;
            or two are equal, of which it would match either.
    """
    seen: dict[str, str] = {}
    for entry in definition["added_tokens"]:
        if not (entry["normalized"] and inner.normalizer):
            continue
        normalized = inner.normalizer.normalize_str(entry["content"])
        if not normalized:
            raise ValueError(
                f"{name}: the added token {entry['content']!r} is empty once normalized"
            )
        if normalized in seen:
            raise ValueError(
                f"{name}: the added tokens {seen[normalized]!r} and {entry['content']!r} are equal"
                " once normalized"
            )
        seen[normalized] = entry["content"]


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return any(
        has_component(definition.get(x), "ByteLevel") for x in ("pre_tokenizer", "normalizer")
    )


def span_byte_counts(text: str, spans: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Counts the bytes of a text that each token represents, by its offsets.

    Args:
        text: The text.
        spans: `(T, 2)` int64, the start and end offset of each token, in characters.
        expected: `(T,)` int64, the expected bytes of each token; they are kept where the sum over
            tokens that share characters is right.

    Returns:
        `(T,)` int64, the bytes of each token, which add up to all bytes of the text. Characters
        between tokens count for the next token, those at the end for the last one.
    """
    if not len(spans):
        return expected
    # Where affixes are spelled as bytes, the library's offsets exceed the text.
    spans = np.minimum(spans, len(text))
    # Offsets in bytes; a token may start before the previous one ends.
    widths = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    ends = np.maximum.accumulate(spans[:, 1])
    if expected[0] == 0:  # A prepended token, which has the offsets of the first character.
        ends[0] = 0
    ends[-1] = len(text)
    sizes = np.diff(offsets[ends], prepend=0)
    is_start = np.concatenate([[True], spans[1:, 0] >= ends[:-1]])
    starts = np.flatnonzero(is_start)
    agree = np.add.reduceat(sizes, starts) == np.add.reduceat(expected, starts)
    return np.where(agree[np.cumsum(is_start) - 1], expected, sizes)
