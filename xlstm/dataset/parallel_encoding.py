"""Encodes blocks of documents on several cores, in order and without piling them up."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from xlstm.dataset.base_tokenizer import TextError
from xlstm.dataset.document_readers import Block
from xlstm.dataset.token_store_writer import EncodedDocuments, encode_documents
from xlstm.dataset.tokenizer import Tokenizer

# While some blocks are parsed and counted, the `tokenizers` library encodes others.
_BLOCKS_AT_ONCE = 4


def encode_blocks(
    blocks: Iterable[Block], tokenizer: Tokenizer, workers: int, skip_bad_records: bool = False
) -> Iterator[tuple[Block, EncodedDocuments]]:
    """Encodes blocks.

    Args:
        blocks: Taken one by one, a few ahead of what has been handed out.
        tokenizer: What to encode with.
        workers: The number of threads that the `tokenizers` library encodes with. It counts for the
            first use of the library in a process.
        skip_bad_records: Leave malformed records out, and list them in `bad_records`.

    Yields:
        Each block with its documents, in the order of `blocks` however many workers there are.

    Raises:
        ValueError: A document is malformed (unless they are left out), or a file damaged.
        OSError: A file cannot be read.
    """
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    pool = ThreadPoolExecutor(_BLOCKS_AT_ONCE)
    pending = collections.deque()
    try:
        for block in blocks:
            pending.append((block, pool.submit(_encode, block, tokenizer, skip_bad_records)))
            if len(pending) > 2 * _BLOCKS_AT_ONCE:
                block, documents = pending.popleft()
                yield block, documents.result()
        for block, documents in pending:
            yield block, documents.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(block: Block, tokenizer: Tokenizer, skip_bad_records: bool) -> EncodedDocuments:
    bad_records: list[str] = []
    texts = block.texts(bad_records.append if skip_bad_records else None)
    try:
        documents = encode_documents(tokenizer, texts)
    except TextError as error:
        raise ValueError(f"{block.place(error.index)}: {error}") from error
    return dataclasses.replace(documents, bad_records=tuple(bad_records))
