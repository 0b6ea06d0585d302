"""The tokenizer in a run's folder, so that a model can be used without its data."""

import json

from xlstm.dataset.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.llm.workdir import Workdir


def write_tokenizer(workdir: Workdir, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer into a run's folder, in files as public models have them."""
    if tokenizer.definition is not None:
        write_atomically(workdir.tokenizer, tokenizer.definition.decode("utf-8"))
        write_atomically(workdir.tokenizer_config, tokenizer_config(tokenizer))


def tokenizer_config(tokenizer: Tokenizer) -> str:
    """The content of the file beside a tokenizer's definition: how to load it, and its marker."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eod_token}
    return json.dumps(config, indent=2) + "\n"


def check_same_tokenizer(known: str | None, found: str) -> None:
    """Checks that data is of the tokenizer that a model was trained with.

    Args:
        known: The model's fingerprint, as a checkpoint's `run_info` has it.
        found: The data's.

    Raises:
        ValueError: If the model's is known and another one.
    """
    if known not in (None, found):
        raise ValueError(
            f"the data was encoded with another tokenizer ({found}) than what the model was trained"
            f" on ({known}): prepare it with that one"
        )


def read_tokenizer(workdir: Workdir, fingerprint: str | None) -> Tokenizer | None:
    """Reads the tokenizer of a run.

    Args:
        workdir: The run's folder.
        fingerprint: That of the tokenizer, as a checkpoint's `run_info` has it; None for a model
            that came without one.

    Returns:
        The tokenizer; None for such a model.

    Raises:
        ValueError: If it is missing, or another one.
    """
    if fingerprint is None:
        return None
    is_byte = fingerprint == ByteTokenizer.fingerprint
    tokenizer = load_tokenizer(ByteTokenizer.name if is_byte else workdir.tokenizer)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{workdir.tokenizer} is not the tokenizer of the run: its fingerprint is"
            f" {tokenizer.fingerprint}, not {fingerprint}"
        )
    return tokenizer
