"""Encodes blocks of documents in several processes, in order and without piling them up."""

import collections
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from xlstm.dataset.base_tokenizer import TextError
from xlstm.dataset.document_readers import Block
from xlstm.dataset.token_store_writer import EncodedDocuments, encode_documents
from xlstm.dataset.tokenizer import Tokenizer, load_tokenizer

_tokenizer: Tokenizer  # Of a worker.


def encode_blocks(
    blocks: Iterable[Block], tokenizer: Tokenizer, workers: int, skip_bad_records: bool = False
) -> Iterator[tuple[Block, EncodedDocuments]]:
    """Encodes blocks in worker processes, or bytes in a thread.

    Args:
        blocks: Taken one by one, a few ahead of what has been handed out.
        tokenizer: What `load_tokenizer` returned; each worker process loads it again.
        workers: The number of processes.
        skip_bad_records: Leave malformed records out, and list them in `bad_records`.

    Yields:
        Each block with its documents, in the order of `blocks` however many workers there are.

    Raises:
        ValueError: A document is malformed (unless they are left out), or a file damaged.
        OSError: A file cannot be read, or a worker died.
    """
    pool = _create_pool(tokenizer, workers)
    pending = collections.deque()
    try:
        for block in blocks:
            pending.append((block, pool.submit(_encode, block, skip_bad_records)))
            if len(pending) > 2 * workers:
                block, documents = pending.popleft()
                yield block, documents.result()
        for block, documents in pending:
            yield block, documents.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, perhaps for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _create_pool(tokenizer: Tokenizer, workers: int) -> Executor:
    if tokenizer.definition is None:
        # Bytes are encoded faster than they go from one process to another.
        return ThreadPoolExecutor(1, initializer=_use_tokenizer, initargs=(tokenizer,))
    return ProcessPoolExecutor(
        workers,
        # Not forked: the progress bar runs in a thread, and forking threads can hang.
        multiprocessing.get_context("spawn"),
        _start_worker,
        (tokenizer.name, tokenizer.eod_token, tokenizer.bos_token),
    )


def _use_tokenizer(tokenizer: Tokenizer) -> None:
    """Sets what `_encode` encodes with."""
    global _tokenizer
    _tokenizer = tokenizer


def _start_worker(tokenizer_name: str, eod_token: str, bos_token: str) -> None:
    """Prepares a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the parent to handle.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Otherwise the library starts a thread for each core, in each worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _use_tokenizer(load_tokenizer(tokenizer_name, eod_token, bos_token))


def _die_with_parent() -> None:
    """Ends this process when its parent is gone: killed, it cannot tell its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(block: Block, skip_bad_records: bool) -> EncodedDocuments:
    bad_records: list[str] = []
    texts = block.texts(bad_records.append if skip_bad_records else None)
    try:
        documents = encode_documents(_tokenizer, texts)
    except TextError as error:
        raise ValueError(f"{block.place(error.index)}: {error}") from error
    return dataclasses.replace(documents, bad_records=tuple(bad_records))
