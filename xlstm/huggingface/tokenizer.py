"""Tokenizers of models in the Hugging Face format."""

import os

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from xlstm.dataset.token_pieces import byte_letters
from xlstm.dataset.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from xlstm.files import find_file, write_atomically
from xlstm.trainer.llm.run_tokenizer import tokenizer_config


def find_tokenizer(folder: str, eod_token: str | None = None) -> Tokenizer | None:
    """Loads the tokenizer of a model in the Hugging Face format.

    Args:
        folder: The model's folder.
        eod_token: The token that ends documents; None for the one that the model's files name.

    Returns:
        The tokenizer: a `ByteTokenizer` for the files of `write_byte_tokenizer_files`, None if
        there is no `tokenizer.json`.

    Raises:
        ValueError: If the tokenizer cannot be used.
    """
    path = find_file(folder, TOKENIZER_FILE)
    if path is None:
        return None
    tokenizer = load_tokenizer(path, eod_token)
    is_byte = tokenizer.definition == _byte_tokenizer_json().encode()
    return ByteTokenizer() if is_byte else tokenizer


def write_byte_tokenizer_files(folder: str) -> None:
    """Writes the files of a tokenizer that is equivalent to `ByteTokenizer`."""
    write_atomically(os.path.join(folder, TOKENIZER_FILE), _byte_tokenizer_json())
    config = tokenizer_config(ByteTokenizer())
    write_atomically(os.path.join(folder, TOKENIZER_CONFIG_FILE), config)


def _byte_tokenizer_json() -> str:
    """Returns a tokenizer of single bytes: the id is the byte, and there are no merges."""
    letters = list(byte_letters())
    letters[ByteTokenizer.eod_id] = ByteTokenizer.eod_token  # A NUL character has no token.
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([ByteTokenizer.eod_token])
    return inner.to_str(pretty=True)
