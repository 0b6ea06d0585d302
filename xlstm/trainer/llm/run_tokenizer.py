"""The tokenizer in a run's folder, so that a model can be used without its data."""

import json

from xlstm.dataset.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.llm.workdir import Workdir


def write_tokenizer(workdir: Workdir, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer into a run's folder, in files as public models have them."""
    if tokenizer.definition is not None:
        write_atomically(workdir.tokenizer, tokenizer.definition.decode("utf-8"))
        config = {"eos_token": tokenizer.eod_token}
        write_atomically(workdir.tokenizer_config, json.dumps(config, indent=2) + "\n")


def read_tokenizer(workdir: Workdir, fingerprint: str | None) -> Tokenizer:
    """Reads the tokenizer of a run.

    Args:
        workdir: The run's folder.
        fingerprint: That of the tokenizer, as a checkpoint's `run_info` has it; None for a model
            that came without one.

    Raises:
        ValueError: If there is none, or another one.
    """
    if fingerprint is None:
        raise ValueError(f"the model in {workdir.path} came without a tokenizer: use token ids")
    is_byte = fingerprint == ByteTokenizer.fingerprint
    tokenizer = load_tokenizer(ByteTokenizer.name if is_byte else workdir.tokenizer)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{workdir.tokenizer} is not the tokenizer of the run: its fingerprint is"
            f" {tokenizer.fingerprint}, not {fingerprint}"
        )
    return tokenizer
