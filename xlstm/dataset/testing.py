"""Small tokenizers and stores for tests."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import TokenStoreWriter, encode_documents
from xlstm.dataset.tokenizer import ByteTokenizer, Tokenizer


def write_tokenizer_json(
    path: str, special_tokens: Sequence[str] = ("<|endoftext|>",), words: Sequence[str] = ()
) -> str:
    """Writes a byte-level BPE `tokenizer.json` that knows each of `words` as one token.

    Args:
        path: The file to write.
        special_tokens: The first entries of its vocabulary.
        words: Text to learn merges from.

    Returns:
        The path.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([word for word in words for _ in range(2)], trainer)
    inner.save(str(path))
    return str(path)


def write_store(path: str, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> TokenStore:
    """Writes a token store, by default of bytes.

    Args:
        path: The folder to make.
        texts: A text a document.
        tokenizer: What to encode with.

    Returns:
        The store.
    """
    tokenizer = tokenizer or ByteTokenizer()
    with TokenStoreWriter(str(path), tokenizer) as writer:
        writer.add(encode_documents(tokenizer, texts))
    return TokenStore.open(str(path))


def write_letter_store(path: str, first: int = 1, documents: int = 60, seed: int = 0) -> TokenStore:
    """Writes a store of bytes whose documents are told apart by their tokens.

    Args:
        path: The folder to make.
        first: Document `i` is the byte `first + i` again and again.
        documents: How many there are.
        seed: Decides their lengths.

    Returns:
        The store.
    """
    lengths = np.random.default_rng(seed).integers(5, 40, documents)
    return write_store(path, [chr(first + i) * int(n) for i, n in enumerate(lengths)])


def config_for(*stores: TokenStore, **fields: Any) -> DataConfig:
    """Returns a configuration of small batches from some stores, with other fields as given."""
    defaults = {"context_length": 16, "batch_size": 8, "validation_fraction": 0.2}
    return DataConfig(stores=tuple(store.path for store in stores), **{**defaults, **fields})


def letters(batches: Iterable[Batch]) -> set[int]:
    """Returns the distinct tokens that are seen in some batches, markers apart."""
    seen = set()
    for batch in batches:
        seen |= set(batch.inputs[:, 1:][batch.targets_mask[:, :-1]].tolist())
        seen |= set(batch.targets[batch.targets_mask].tolist())
    return seen - {0}


def assert_equal_batches(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    """Asserts that two lists of batches are the same, field by field."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for field, expected in vars(other).items():
            np.testing.assert_array_equal(getattr(one, field), expected)
