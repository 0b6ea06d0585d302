"""The tokenizer in a run's folder, so that a model can be used without its data."""

import json
import os
from collections.abc import Mapping
from typing import Any

from xlstm.dataset.base_tokenizer import ByteTokenizer, Tokenizer, read_definition
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.tokenizer import (
    GENERATION_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    describe,
    load_tokenizer,
    same_tokenizer,
    tokenizer_token,
)
from xlstm.files import find_file, read_file, read_json, write_atomically
from xlstm.trainer.llm.workdir import Workdir
from xlstm.visible_text import short_repr

# Files and folders that public models have for their tokenizers.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def write_tokenizer(workdir: Workdir, tokenizer: Tokenizer, source: Workdir | None) -> None:
    """Writes a tokenizer into a run's folder, in files as public models have them.

    Args:
        workdir: The run's folder.
        tokenizer: What `choose_tokenizer` returned.
        source: The folder of the model that the run begins with, if any. Its files come along: its
            tokenizer's, its ids of special tokens and its sampling defaults.
    """
    if source:
        copy_files(source.path, workdir.path, (*TOKENIZER_FILES, GENERATION_CONFIG_FILE))
    if tokenizer.definition is None:
        return
    if not _holds(workdir, tokenizer):
        write_atomically(workdir.tokenizer, tokenizer.definition.decode("utf-8"))
        write_atomically(workdir.tokenizer_config, tokenizer_config(tokenizer))
    write_markers(workdir, tokenizer)


def _holds(workdir: Workdir, tokenizer: Tokenizer) -> bool:
    """Whether the folder has a tokenizer's file already."""
    path = workdir.tokenizer
    return os.path.exists(path) and read_definition(path) == tokenizer.definition


def copy_files(source: str, target: str, names: tuple[str, ...]) -> None:
    """Copies those of some files and folders that there are from one folder to another.

    Args:
        source: The folder.
        target: The other one.
        names: Plain names in it.

    Raises:
        ValueError: If one leads out of the folder, or is no file, or too large for one.
        OSError: If something cannot be read or written.
    """
    for name in names:
        path, copy = find_file(source, name), os.path.join(target, name)
        if path is None:
            continue
        if not os.path.isdir(path):
            write_atomically(copy, read_file(path))
        elif os.path.islink(path):  # There would be no end if it were that of a folder around it.
            raise ValueError(f"{path} is a link to a folder: put the folder itself there")
        else:
            os.makedirs(copy, exist_ok=True)
            copy_files(path, copy, tuple(os.listdir(path)))


def write_markers(workdir: Workdir, tokenizer: Tokenizer) -> None:
    """Writes the markers that a run's documents have, whatever other files name."""
    markers = {"bos_token": tokenizer.bos_token, "eod_token": tokenizer.eod_token}
    write_atomically(workdir.markers, json.dumps(markers, indent=2) + "\n")


def tokenizer_config(tokenizer: Tokenizer) -> str:
    """The content of the file beside a tokenizer's definition: how to load it, and its markers."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eod_token,
    }
    return json.dumps(config, indent=2) + "\n"


def choose_tokenizer(workdir: Workdir, tokenizer: Tokenizer) -> Tokenizer:
    """Chooses the file that a run has of its tokenizer, where several say the same.

    Args:
        workdir: The run's folder, or that of the model that it begins with.
        tokenizer: That of the data.

    Returns:
        The tokenizer in the folder if it is the same but for the layout of its file, or else that
        of the data.
    """
    if tokenizer.definition is None or not os.path.exists(workdir.tokenizer):
        return tokenizer
    definition = read_definition(workdir.tokenizer)
    tokens = (tokenizer.eod_token, tokenizer.bos_token)
    try:
        known = JsonTokenizer(definition, workdir.tokenizer, *tokens)
    except ValueError:  # It lacks the markers.
        return tokenizer
    return known if same_tokenizer(known, tokenizer) else tokenizer


def check_tokenizer(workdir: Workdir, info: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Checks that data is of the tokenizer that a model was trained with.

    Args:
        workdir: The model's folder.
        info: The `run_info` of its checkpoint.
        tokenizer: That of the data.

    Raises:
        ValueError: If the model's is known and another one.
    """
    known = read_tokenizer(workdir, info)
    if known and not same_tokenizer(known, tokenizer):
        flags = f"--tokenizer={workdir.path}"
        if known.bos_token != tokenizer.bos_token:
            flags += f" --bos_token={known.bos_token!r}"
        raise ValueError(
            f"the data was encoded with another tokenizer ({describe(tokenizer)}) than the model"
            f" was trained with ({describe(known)}): encode the data again with the model's"
            f" tokenizer, by prepare_data with {flags}"
        )


def read_tokenizer(workdir: Workdir, info: Mapping[str, Any]) -> Tokenizer | None:
    """Reads the tokenizer of a run.

    Args:
        workdir: The run's folder.
        info: The `run_info` of its checkpoint.

    Returns:
        The tokenizer; None for a model that came without one.

    Raises:
        ValueError: If it is missing, or another one.
    """
    fingerprint = info.get("tokenizer", "")
    if fingerprint is None:
        return None
    if not isinstance(fingerprint, str):
        raise ValueError(
            f"a checkpoint in {workdir.checkpoints} has tokenizer={short_repr(fingerprint)}:"
            " expected a fingerprint"
        )
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if os.path.exists(workdir.markers):
        tokenizer = load_tokenizer(workdir.tokenizer)
    else:  # A run made when there was one marker only.
        definition = read_definition(workdir.tokenizer)
        eod_token = tokenizer_token(workdir.tokenizer, TOKENIZER_CONFIG_FILE, "eos_token")
        tokenizer = JsonTokenizer(definition, workdir.tokenizer, eod_token)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{workdir.tokenizer} is not the tokenizer of the run: its fingerprint is"
            f" {tokenizer.fingerprint}, not {fingerprint}"
        )
    return tokenizer


def read_eos_ids(workdir: Workdir, vocab_size: int) -> tuple[int, ...]:
    """Reads which ids end the texts of a model that came from elsewhere.

    Args:
        workdir: The model's folder.
        vocab_size: The ids that the model knows are below it.

    Returns:
        The ids, ascending; none if the folder does not say.

    Raises:
        ValueError: If what it says are no ids.
    """
    path = find_file(workdir.path, GENERATION_CONFIG_FILE)
    return eos_ids(path, read_json(path), vocab_size) if path else ()


def eos_ids(name: str, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Returns which ids end texts, as a configuration of generation says.

    Args:
        name: What to call it in an error.
        config: What it says.
        vocab_size: The ids that the model knows are below it.

    Returns:
        The ids, ascending; none if it does not say.

    Raises:
        ValueError: If what it says are no ids.
    """
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{name} has eos_token_id={short_repr(ids)}: expected ids")
    return tuple(sorted({i for i in ids if 0 <= i < vocab_size}))
