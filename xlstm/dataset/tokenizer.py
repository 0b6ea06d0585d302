"""Loading of tokenizers: `byte`, or a `tokenizer.json` and the markers that its folder names."""

import dataclasses
import json
import os
from typing import Any

import tokenizers

from xlstm.dataset.base_tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, read_definition
from xlstm.dataset.json_tokenizer import JsonTokenizer, parse_tokenizer
from xlstm.dataset.token_pieces import components
from xlstm.files import find_file, inner_path, read_json
from xlstm.visible_text import short_repr

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MODEL_CONFIG_FILE = "config.json"
MARKERS_FILE = "document_markers.json"  # Written by a run: the markers that it uses.


@dataclasses.dataclass(frozen=True)
class Markers:
    """The document markers that a `tokenizer.json` and the files in its folder name.

    Attributes:
        eod_token: The token after a document; None if nothing names one.
        bos_token: The token before a document; None if nothing names one.
        disagreements: Sentences about files that name another token than `eod_token`.
    """

    eod_token: str | None = None
    bos_token: str | None = None
    disagreements: tuple[str, ...] = ()


def load_tokenizer(
    name_or_path: str, eod_token: str | None = None, bos_token: str | None = None
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name_or_path: "byte", or the path of a `tokenizer.json` or of a folder that holds one.
        eod_token: The vocabulary entry of the marker after documents; for "byte", only NUL. The
            default is the result of `find_markers`, or else the first of `EOD_TOKENS` in the
            vocabulary.
        bos_token: The vocabulary entry of the marker before documents. The default is the result
            of `find_markers`, or else `eod_token`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The tokenizer is missing, cannot be read, or lacks such a marker.
    """
    if name_or_path == ByteTokenizer.name:
        for token in (eod_token, bos_token):
            if token not in (None, ByteTokenizer.eod_token):
                raise ValueError(f"the marker of the byte tokenizer is NUL, it cannot be {token!r}")
        return ByteTokenizer()
    path = tokenizer_path(name_or_path)
    definition = read_definition(path)
    parsed = parse_tokenizer(definition, path)
    if eod_token is None or bos_token is None:
        markers = find_markers(path, parsed)
        eod_token, bos_token = eod_token or markers.eod_token, bos_token or markers.bos_token
    return JsonTokenizer(definition, path, eod_token, bos_token, parsed=parsed)


def tokenizer_path(path: str) -> str:
    """Returns the path of a `tokenizer.json`, given its own path or that of its folder."""
    return inner_path(path, TOKENIZER_FILE) if os.path.isdir(path) else path


def find_markers(path: str, parsed: tokenizers.Tokenizer) -> Markers:
    """Finds the document markers that the files of a model name.

    The first source that names a marker decides:

    * both markers: `document_markers.json`, which runs write;
    * the marker after documents: `eos_token` in `tokenizer_config.json`, then in
      `special_tokens_map.json`; the first `eos_token_id` in `generation_config.json`, then in
      `config.json`;
    * the marker before documents: the token that the tokenizer's post-processor prepends; then
      `bos_token_id` in `generation_config.json` and in `config.json`.

    Args:
        path: The path of the `tokenizer.json`.
        parsed: The result of `parse_tokenizer` for it.

    Returns:
        The markers.

    Raises:
        ValueError: A file cannot be read, or a field does not hold a token.
    """
    decided = [tokenizer_token(path, MARKERS_FILE, key) for key in ("eod_token", "bos_token")]
    if None not in decided:
        return Markers(*decided)
    named: list[tuple[str, list[str]]] = []
    for file in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
        token = tokenizer_token(path, file, "eos_token")
        named += [(file, [token])] if token is not None else []
    bos_token = _leading_token(json.loads(parsed.to_str()))
    for file in (GENERATION_CONFIG_FILE, MODEL_CONFIG_FILE):
        content = _read_beside(path, file)
        tokens = _tokens_of_ids(content, "eos_token_id", parsed)
        named += [(file, tokens)] if tokens else []
        bos_token = bos_token or next(iter(_tokens_of_ids(content, "bos_token_id", parsed)), None)
    if not named:
        return Markers(bos_token=bos_token)
    first_file, (eod_token, *_) = named[0]
    others = [
        f"{file} says {' or '.join(map(repr, tokens))}"
        for file, tokens in named[1:]
        if eod_token not in tokens
    ]
    text = f"the token at the end of a text is {eod_token!r}, as {first_file} says"
    disagreements = (f"{text}; but {', '.join(others)}",) if others else ()
    return Markers(eod_token, bos_token, disagreements)


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether two tokenizers yield the same ids for every text, and the same markers."""
    # For equal files, skip the slower comparison of identities.
    is_equal = one.definition == other.definition and one.eod_id == other.eod_id
    return (is_equal and one.bos_id == other.bos_id) or one.identity == other.identity


def describe(tokenizer: Tokenizer) -> str:
    """Returns a tokenizer's name, vocabulary size, markers and hash, for messages."""
    if tokenizer.definition is None:
        return f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    markers = tokenizer.eod_token
    if tokenizer.bos_id != tokenizer.eod_id:
        markers = f"{tokenizer.bos_token} ... {markers}"
    return (
        f"{tokenizer.name}, {tokenizer.vocab_size:,} ids, markers {markers!r},"
        f" {tokenizer.fingerprint[:19]}"
    )


def _read_beside(path: str, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file of the same folder, or an empty one if it is missing."""
    found = find_file(os.path.dirname(path), name)
    return read_json(found) if found else {}


def tokenizer_token(path: str, file: str, key: str) -> str | None:
    """Reads a token that a file in the folder of a `tokenizer.json` names.

    Args:
        path: The path of the `tokenizer.json`.
        file: The name of the file.
        key: The field, which holds the token or an object with its `content`.

    Returns:
        The token; None if the file or the field is missing.

    Raises:
        ValueError: The file cannot be read, or the field holds something else.
    """
    token = _read_beside(path, file).get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        folder = os.path.dirname(path)
        raise ValueError(
            f"{os.path.join(folder, file)} has {key}={short_repr(token)}: expected a string"
        )
    return token


def _tokens_of_ids(content: dict[str, Any], key: str, inner: tokenizers.Tokenizer) -> list[str]:
    """Returns the tokens that a field names by an id or a list of ids; skips ids without one."""
    ids = content.get(key)
    ids = ids if isinstance(ids, list) else [ids]
    tokens = [inner.id_to_token(i) for i in ids if type(i) is int and 0 <= i < 2**32]
    return [token for token in tokens if token is not None]


def _leading_token(definition: dict[str, Any]) -> str | None:
    """Returns the special token that a post-processor prepends to a text, or None."""
    for part in components(definition.get("post_processor")):
        if part["type"] in ("BertProcessing", "RobertaProcessing"):
            return part["cls"][0]
        first = (part.get("single") or [{}])[0]
        if part["type"] == "TemplateProcessing" and "SpecialToken" in first:
            token = first["SpecialToken"]["id"]
            entry = (part.get("special_tokens") or {}).get(token)
            return entry["tokens"][0] if entry else token
    return None
