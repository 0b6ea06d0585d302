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
from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.llm.hf_files import read_json
from xlstm.trainer.llm.workdir import Workdir

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
    """Copies those of some files and folders that there are from one folder to another."""
    for name in names:
        path, copy = os.path.join(source, name), os.path.join(target, name)
        if os.path.isdir(path):
            os.makedirs(copy, exist_ok=True)
            copy_files(path, copy, tuple(os.listdir(path)))
        elif os.path.exists(path):
            with open(path, "rb") as file:
                write_atomically(copy, file.read())


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
    if info["tokenizer"] is None:
        return
    known = read_tokenizer(workdir, info)
    if not same_tokenizer(known, tokenizer):
        flags = f"--tokenizer={workdir.path}"
        if known.bos_token != tokenizer.bos_token:
            flags += f" --bos_token={known.bos_token!r}"
        raise ValueError(
            f"the data was encoded with another tokenizer ({describe(tokenizer)}) than what the"
            f" model was trained on ({describe(known)}): prepare it with that one, as {flags}"
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
    fingerprint = info["tokenizer"]
    if fingerprint is None:
        return None
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
    if not os.path.exists(workdir.generation_config):
        return ()
    ids = read_json(workdir.generation_config).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{workdir.generation_config} has eos_token_id={ids}: expected ids")
    return tuple(sorted({i for i in ids if 0 <= i < vocab_size}))
