"""The tokenizer files that public models have beside them, brought to a run's folder and back."""

import os
import shutil

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from xlstm.dataset.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.llm.run_tokenizer import tokenizer_config

_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def find_tokenizer(folder: str) -> Tokenizer | None:
    """Loads the tokenizer of a public model.

    Args:
        folder: The model's folder.

    Returns:
        The tokenizer; that of bytes if `write_byte_tokenizer_files` wrote it. None if there is no
        `tokenizer.json`.

    Raises:
        ValueError: If it cannot be used.
    """
    path = os.path.join(folder, TOKENIZER_FILE)
    if not os.path.exists(path):
        return None
    tokenizer = load_tokenizer(path)
    is_byte = tokenizer.definition == _byte_tokenizer_json().encode()
    return ByteTokenizer() if is_byte else tokenizer


def copy_tokenizer_files(source: str, target: str) -> None:
    """Copies all tokenizer files that there are from one folder to another."""
    for name in _FILES:
        if os.path.exists(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def write_byte_tokenizer_files(folder: str) -> None:
    """Writes the byte tokenizer, which is no file of ours, as public models have theirs."""
    write_atomically(os.path.join(folder, TOKENIZER_FILE), _byte_tokenizer_json())
    config = tokenizer_config(ByteTokenizer())
    write_atomically(os.path.join(folder, TOKENIZER_CONFIG_FILE), config)


def _byte_tokenizer_json() -> str:
    """A vocabulary of single bytes: the id is the byte, and nothing is merged."""
    # Bytes that are printable stand for themselves there, the others for letters further on.
    alphabet = set(ByteLevel.alphabet())
    others = iter(sorted(letter for letter in alphabet if ord(letter) > 255))
    letters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    letters[ByteTokenizer.eod_id] = ByteTokenizer.eod_token  # A NUL in a text has no token.
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([ByteTokenizer.eod_token])
    return inner.to_str(pretty=True)
