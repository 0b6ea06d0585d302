"""The tokenizer in a run's folder, with which a model can be used without its data."""

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

# Files and folders of tokenizers in the Hugging Face format.
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
    """Writes a tokenizer into a run's folder, in the Hugging Face format.

    Args:
        workdir: The run's folder.
        tokenizer: Result of `choose_tokenizer`.
        source: Folder of the run that the parameters come from, if any. The files of its tokenizer,
            its ids of special tokens and its sampling defaults are copied.
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
    """Returns whether a run's folder has this tokenizer's file already."""
    path = workdir.tokenizer
    return os.path.exists(path) and read_definition(path) == tokenizer.definition


def copy_files(source: str, target: str, names: tuple[str, ...]) -> None:
    """Copies files and folders from one folder to another; missing ones are left out.

    Args:
        source: The folder to copy from.
        target: The folder to copy to.
        names: Names of the files and folders in `source`, without directories.

    Raises:
        ValueError: If a name leads out of `source`, is a link to a folder or no regular file, or is
            too large.
        OSError: If something cannot be read or written.
    """
    for name in names:
        path, copy = find_file(source, name), os.path.join(target, name)
        if path is None:
            continue
        if not os.path.isdir(path):
            write_atomically(copy, read_file(path))
        elif os.path.islink(path):  # Copying a link to a parent folder would never end.
            raise ValueError(f"{path} is a link to a folder: expected the folder itself")
        else:
            os.makedirs(copy, exist_ok=True)
            copy_files(path, copy, tuple(os.listdir(path)))


def write_markers(workdir: Workdir, tokenizer: Tokenizer) -> None:
    """Writes the markers of a run's documents; they override those in other files."""
    markers = {"bos_token": tokenizer.bos_token, "eod_token": tokenizer.eod_token}
    write_atomically(workdir.markers, json.dumps(markers, indent=2) + "\n")


def tokenizer_config(tokenizer: Tokenizer) -> str:
    """Returns the content of `tokenizer_config.json`: how to load a tokenizer, and its markers."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eod_token,
    }
    return json.dumps(config, indent=2) + "\n"


def choose_tokenizer(workdir: Workdir, tokenizer: Tokenizer) -> Tokenizer:
    """Chooses between the files of the data's and the run's tokenizer, if both say the same.

    A run keeps its file, byte for byte, even if the data has the same tokenizer in another layout.

    Args:
        workdir: The run's folder, or that of the run that the parameters come from.
        tokenizer: The tokenizer of the data.

    Returns:
        The tokenizer in the folder if it equals that of the data, except for the layout of its
        file; otherwise the tokenizer of the data.
    """
    if tokenizer.definition is None or not os.path.exists(workdir.tokenizer):
        return tokenizer
    definition = read_definition(workdir.tokenizer)
    tokens = (tokenizer.eod_token, tokenizer.bos_token)
    try:
        known = JsonTokenizer(definition, workdir.tokenizer, *tokens)
    except ValueError:  # It has no such markers.
        return tokenizer
    return known if same_tokenizer(known, tokenizer) else tokenizer


def check_tokenizer(workdir: Workdir, info: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Checks that data has the tokenizer that a model was trained with.

    Args:
        workdir: The folder of the model's run.
        info: The `run_info` of its checkpoint.
        tokenizer: The tokenizer of the data.

    Raises:
        ValueError: If the model's tokenizer is known and differs.
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
        The tokenizer; None for a converted model that came without one.

    Raises:
        ValueError: If it is missing, or is not the tokenizer of the checkpoint.
    """
    fingerprint = info.get("tokenizer", "")
    if fingerprint is None:
        return None
    if not isinstance(fingerprint, str):
        raise ValueError(
            f"a checkpoint in {workdir.checkpoints} has tokenizer={short_repr(fingerprint)}:"
            " expected a fingerprint, as a string"
        )
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if os.path.exists(workdir.markers):
        tokenizer = load_tokenizer(workdir.tokenizer)
    else:  # A run from before there were two markers.
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
    """Reads the ids that end the texts of a converted model.

    Args:
        workdir: The model's folder.
        vocab_size: Vocabulary size of the model; ids from it on are left out.

    Returns:
        The ids in ascending order; none if the folder has no `generation_config.json`.

    Raises:
        ValueError: If `eos_token_id` in that file is neither an id nor a list of ids.
    """
    path = find_file(workdir.path, GENERATION_CONFIG_FILE)
    return eos_ids(path, read_json(path), vocab_size) if path else ()


def eos_ids(name: str, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Returns the ids that end texts, from the content of a `generation_config.json`.

    Args:
        name: Name of the file in errors.
        config: Content of the file.
        vocab_size: Vocabulary size of the model; ids from it on are left out.

    Returns:
        The ids in ascending order; none without `eos_token_id`.

    Raises:
        ValueError: If `eos_token_id` is neither an id nor a list of ids.
    """
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{name} has eos_token_id={short_repr(ids)}: expected ids")
    return tuple(sorted({i for i in ids if 0 <= i < vocab_size}))
