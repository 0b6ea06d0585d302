"""Small tokenizers and token stores for tests."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.dataset.store_verification import verify_store
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import TokenStoreWriter, encode_documents
from xlstm.dataset.tokenizer import ByteTokenizer, Tokenizer


def write_tokenizer_json(
    path: str, special_tokens: Sequence[str] = ("<|endoftext|>",), words: Sequence[str] = ()
) -> str:
    """Writes a byte-level BPE `tokenizer.json` in which each of `words` is one token.

    Args:
        path: The file to write.
        special_tokens: The first entries of the vocabulary.
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


_WORDS = "the cat sat on a mat, grüße an die größte Stadt! สวัสดี ชาวโลก 你好 世界 café naïve"
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@functools.cache
def tokenizer_families() -> dict[str, bytes]:
    """Trains a small tokenizer of each family, on few words, so that most text is unknown to it.

    Returns:
        The content of each `tokenizer.json`, by family. They have the special tokens `<s>`,
        `</s>`, `<pad>` and, except for the byte-level ones, `<unk>`.
    """
    models, decoders = tokenizers.models, tokenizers.decoders
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    byte_fallback = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    collapsed = [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    unknown = {"unk_token": "<unk>"}
    # Each: model, normalizer, pre-tokenizer, decoder.
    parts = {
        "byte_level": (
            models.BPE(),
            None,
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        ),
        "byte_level_prefix": (models.BPE(), None, pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
        "byte_fallback_bpe": (
            models.BPE(byte_fallback=True, fuse_unk=True, **unknown),
            normalizers.Sequence(spaces),
            None,
            decoders.Sequence([decoders.Replace("▁", " "), *byte_fallback]),
        ),
        "byte_fallback_unigram": (
            models.Unigram(),
            None,
            pre_tokenizers.Metaspace(),
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        ),
        "metaspace_unigram": (
            models.Unigram(),
            None,
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "changing_unigram": (
            models.Unigram(),
            normalizers.Sequence(collapsed),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "word_piece": (
            models.WordPiece(**unknown),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        ),
        "word_level": (models.WordLevel(**unknown), None, pre_tokenizers.WhitespaceSplit(), None),
        "suffix_bpe": (
            models.BPE(end_of_word_suffix="</w>", **unknown),
            None,
            pre_tokenizers.WhitespaceSplit(),
            decoders.BPEDecoder(),
        ),
    }
    return {name: _train_family(name, *of_name) for name, of_name in parts.items()}


def _train_family(name: str, model, normalizer, pre_tokenizer, decoder) -> bytes:
    """Trains one of `tokenizer_families`."""
    inner = tokenizers.Tokenizer(model)
    for part, value in [
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
    ]:
        if value is not None:
            setattr(inner, part, value)
    settings = {"vocab_size": 400, "special_tokens": _SPECIAL, "show_progress": False}
    if name == "suffix_bpe":
        settings["end_of_word_suffix"] = "</w>"
    elif name == "byte_fallback_bpe":
        settings["special_tokens"] = _SPECIAL + _BYTE_TOKENS
    elif "byte_level" in name:
        settings["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        settings["special_tokens"] = _SPECIAL[1:]
    elif "unigram" in name:
        settings["unk_token"] = "<unk>"
    trainer = getattr(tokenizers.trainers, type(model).__name__.replace("BPE", "Bpe") + "Trainer")
    inner.train_from_iterator([_WORDS, *_WORDS.split()] * 2, trainer(**settings))
    definition = json.loads(inner.to_str())
    # In such vocabularies, byte tokens are ordinary entries.
    added = [x for x in definition["added_tokens"] if x["content"] not in _BYTE_TOKENS]
    definition["added_tokens"] = added
    if name == "byte_fallback_unigram":
        definition["model"]["byte_fallback"] = True
        definition["model"]["vocab"] += [[token, -12.0] for token in _BYTE_TOKENS]
    return json.dumps(definition, ensure_ascii=False).encode()


def random_text(rng: np.random.Generator, size: int = 12) -> str:
    """Returns a random text of known and unknown words, spelled-out tokens and odd characters."""
    parts = [*_WORDS.split(), *_SPECIAL, "<0x41>", "<0xE0>", "Übermut", "🌶", "한국", "x", "ﬁ", "①"]
    parts += [" ", " ", "  ", "\n", "\ufffd", "e\u0301", "▁", "</w>", "##a", "\t", "Ġ", ".", " ."]
    return "".join(parts[i] for i in rng.integers(0, len(parts), rng.integers(0, size + 1)))


def write_store(path: str, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> TokenStore:
    """Writes a token store.

    Args:
        path: The folder to create.
        texts: The text of each document.
        tokenizer: The tokenizer to encode with; by default, the byte tokenizer.

    Returns:
        The store.
    """
    tokenizer = tokenizer or ByteTokenizer()
    with TokenStoreWriter(str(path), tokenizer) as writer:
        writer.add(encode_documents(tokenizer, texts))
    return TokenStore.open(str(path))


def open_verified(path: str) -> TokenStore:
    """Opens a token store and verifies all of it."""
    store = TokenStore.open(str(path))
    verify_store(store)
    return store


def write_letter_store(path: str, first: int = 1, documents: int = 60, seed: int = 0) -> TokenStore:
    """Writes a store of bytes whose documents each repeat a byte of their own.

    Args:
        path: The folder to create.
        first: The byte of the first document; document `i` repeats the byte `first + i`.
        documents: The number of documents.
        seed: The seed of their lengths.

    Returns:
        The store.
    """
    lengths = np.random.default_rng(seed).integers(5, 40, documents)
    return write_store(path, [chr(first + i) * int(n) for i, n in enumerate(lengths)])


def config_for(*stores: TokenStore, **fields: Any) -> DataConfig:
    """Returns a configuration of small batches from some stores, with the given fields."""
    defaults = {"context_length": 16, "batch_size": 8, "validation_fraction": 0.2}
    return DataConfig(stores=tuple(store.path for store in stores), **{**defaults, **fields})


def seen_tokens(batches: Iterable[Batch]) -> set[int]:
    """Returns the distinct tokens in some batches, without markers and padding."""
    seen = set()
    for batch in batches:
        seen |= set(batch.inputs[:, 1:][batch.targets_mask[:, :-1]].tolist())
        seen |= set(batch.targets[batch.targets_mask].tolist())
    return seen - {0}


def assert_equal_batches(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    """Asserts that two lists of batches are equal, field by field."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for field, expected in vars(other).items():
            np.testing.assert_array_equal(getattr(one, field), expected)
