"""Small tokenizers and stores for tests."""

from collections.abc import Sequence

import tokenizers

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
