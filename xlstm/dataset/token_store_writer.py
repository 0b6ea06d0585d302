"""Writing of token stores, with documents encoded in several threads."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from xlstm.dataset.base_tokenizer import TokenizationError
from xlstm.dataset.document_block import DocumentBlock
from xlstm.dataset.store_meta import (
    CORRECTIONS_FILE,
    DOCUMENTS_FILE,
    OFFSET_DTYPE,
    TOKENS_FILE,
    StoreMeta,
)
from xlstm.dataset.token_store import META_FILE
from xlstm.dataset.tokenizer import TOKENIZER_FILE, Tokenizer
from xlstm.files import Checksum, naming_file, new_folder

# While some threads parse blocks and count their tokens, others encode.
_BLOCKS_AT_ONCE = 4
_HASHER = ThreadPoolExecutor(1)


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """Documents in the format of a token store.

    Attributes:
        tokens: `(T,)`, the ids of all `N` documents, with markers.
        lengths: `(N,)` int64, the number of tokens of each document, markers included.
        text_bytes: The size of their text in UTF-8.
        num_empty: The number of texts without a token, which were skipped.
        num_characters: The number of characters of all texts.
        corrections: `(C, 2)` int64, see `TokenStore`; the indices are into `tokens`.
        num_unknown: The number of unknown tokens.
        dropped: The characters without a token, by the index of their text among all texts.
        bad_records: A message for each malformed record, which was skipped.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    num_empty: int
    num_characters: int = 0
    corrections: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    num_unknown: int = 0
    dropped: dict[int, str] = dataclasses.field(default_factory=dict)
    bad_records: tuple[str, ...] = ()


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> EncodedDocuments:
    """Encodes texts as documents; a text without any token is skipped and counted.

    Args:
        tokenizer: The tokenizer of the store.
        texts: The text of each document.

    Returns:
        The documents, ready for `TokenStoreWriter.add`.

    Raises:
        ValueError: A text cannot be encoded; see `Tokenizer.encode_batch`.
    """
    texts = list(texts)
    encoded = tokenizer.encode_batch(texts)
    lengths = encoded.lengths[encoded.lengths > 0]
    # A marker before each document, and another one after it if they differ.
    num_markers = 1 if tokenizer.bos_id == tokenizer.eod_id else 2
    ends = np.cumsum(lengths)
    tokens = np.empty(encoded.ids.size + num_markers * lengths.size, tokenizer.dtype)
    for index, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
        stop = end + num_markers * index + 1
        tokens[stop - length - 1] = tokenizer.bos_id
        tokens[stop - length : stop] = encoded.ids[end - length : end]
        tokens[stop : stop + num_markers - 1] = tokenizer.eod_id
    documents = np.searchsorted(ends, encoded.corrected, side="right")
    indices = encoded.corrected + num_markers * documents + 1
    return EncodedDocuments(
        tokens=tokens,
        lengths=lengths + num_markers,
        text_bytes=int(encoded.text_bytes[encoded.lengths > 0].sum()),
        num_characters=sum(map(len, texts)),
        num_empty=len(texts) - lengths.size,
        corrections=np.stack([indices, encoded.corrected_bytes], axis=1),
        num_unknown=encoded.num_unknown,
        dropped=encoded.dropped,
    )


class TokenStoreWriter:
    """A writer of one token store, as a context manager.

    When the block ends, the complete store appears at its path. After an exception, nothing is
    left. A process that is killed leaves at most a folder `<path>.incomplete-...`, which does not
    open as a store and may be removed.
    """

    def __init__(self, path: str, tokenizer: Tokenizer):
        """Starts a store.

        Args:
            path: The folder to create; missing parents are created too.
            tokenizer: The tokenizer of the documents.

        Raises:
            FolderExistsError: `path` exists; it is never overwritten.
            OSError: The folder cannot be created.
        """
        self.path = os.path.abspath(path)
        self._tokenizer = tokenizer
        self._num_documents = 0
        self._num_tokens = 0
        self._text_bytes = 0
        self._corrections: _HashedFile | None = None  # Created with the first correction.
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(new_folder(self.path, one_writer=False))
            self._tokens = stack.enter_context(_HashedFile(self._folder, TOKENS_FILE))
            self._documents = stack.enter_context(_HashedFile(self._folder, DOCUMENTS_FILE))
            self._cleanup = stack.pop_all()

    def __enter__(self) -> "TokenStoreWriter":
        """Returns the writer."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finishes the store, or removes it after an exception."""
        if exc_type is not None:
            self._cleanup.__exit__(exc_type, exc, traceback)
            return
        with self._cleanup:
            self._finish()

    def add(self, documents: EncodedDocuments) -> None:
        """Appends documents.

        Args:
            documents: The result of `encode_documents` with the store's tokenizer.

        Raises:
            ValueError: The ids are not documents of this tokenizer.
            OSError: The disk is full, or fails.
        """
        tokens, lengths = documents.tokens, documents.lengths
        if not lengths.size:
            return
        starts = np.cumsum(lengths) - lengths
        ends = starts + lengths - 1
        bos_id, eod_id = self._tokenizer.bos_id, self._tokenizer.eod_id
        is_delimited = _has_only_at(tokens, bos_id, starts)
        if eod_id != bos_id:
            is_delimited &= _has_only_at(tokens, eod_id, ends)
        if tokens.dtype != self._tokenizer.dtype or not is_delimited:
            raise ValueError(
                f"the documents were not encoded with this store's tokenizer "
                f"{self._tokenizer.name}: expected markers at their ends and nowhere else"
            )
        if tokens.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"the documents hold the id {tokens.max()}: expected ids below the vocabulary size"
                f" {self._tokenizer.vocab_size} of the tokenizer {self._tokenizer.name}"
            )
        self._tokens.write(memoryview(tokens).cast("B"))
        self._documents.write((starts + self._num_tokens).astype(OFFSET_DTYPE).tobytes())
        if len(documents.corrections):
            if self._corrections is None:
                file = _HashedFile(self._folder, CORRECTIONS_FILE)
                self._corrections = self._cleanup.enter_context(file)
            moved = documents.corrections + (self._num_tokens, 0)
            self._corrections.write(moved.astype(OFFSET_DTYPE).tobytes())
        self._num_documents += lengths.size
        self._num_tokens += tokens.size
        self._text_bytes += documents.text_bytes

    def _finish(self) -> None:
        """Writes the remaining files, `meta.json` last."""
        if not self._num_documents:
            raise ValueError(f"no token store was written to {self.path}: the input holds no text")
        self._documents.write(np.array([self._num_tokens], OFFSET_DTYPE).tobytes())
        tokenizer = self._tokenizer
        written = (self._tokens, self._documents, self._corrections)
        files = {file.name: file.close() for file in written if file is not None}
        if tokenizer.definition is not None:
            files[TOKENIZER_FILE] = _write_file(self._folder, TOKENIZER_FILE, tokenizer.definition)
        meta = StoreMeta(
            tokenizer=tokenizer.name if tokenizer.definition is None else TOKENIZER_FILE,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            eod_token=tokenizer.eod_token,
            bos_id=tokenizer.bos_id,
            bos_token=tokenizer.bos_token,
            dtype=tokenizer.dtype.str,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            text_bytes=self._text_bytes,
            files=files,
        )
        _write_file(self._folder, META_FILE, meta.to_json().encode())


def _has_only_at(tokens: np.ndarray, token_id: int, indices: np.ndarray) -> bool:
    """Returns whether a token occurs at all of some distinct indices, and nowhere else."""
    is_inside = indices.size == 0 or (indices[0] >= 0 and indices[-1] < tokens.size)
    return (
        is_inside
        and np.count_nonzero(tokens == token_id) == indices.size
        and bool(np.all(tokens[indices] == token_id))
    )


class _HashedFile:
    """A file that is written sequentially, with its checksum; a context manager."""

    def __init__(self, folder: str, name: str):
        self.name = name
        self._path = os.path.join(folder, name)
        self._file = open(self._path, "wb", buffering=1 << 20)
        self._checksum = Checksum()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # After an error, the file is about to be removed.
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes; an OSError names the file."""
        # Hashing and writing take about equally long, so they run in parallel.
        hashing = _HASHER.submit(self._checksum.update, data)
        try:
            with naming_file(self._path):
                self._file.write(data)
        finally:
            hashing.result()

    def close(self) -> dict[str, int | str]:
        """Flushes the file to the disk and returns its entry in `meta.json`."""
        with naming_file(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._checksum.entry


def _write_file(folder: str, name: str, content: bytes) -> dict[str, int | str]:
    """Writes a small file and returns its entry in `meta.json`."""
    with _HashedFile(folder, name) as file:
        file.write(content)
        return file.close()


def encode_blocks(
    blocks: Iterable[DocumentBlock],
    tokenizer: Tokenizer,
    workers: int,
    skip_bad_records: bool = False,
) -> Iterator[tuple[DocumentBlock, EncodedDocuments]]:
    """Encodes blocks of documents in several threads.

    Args:
        blocks: The blocks; only a few are read ahead.
        tokenizer: The tokenizer to encode with.
        workers: The number of threads of the `tokenizers` library. Only the first use of the
            library in a process sets it.
        skip_bad_records: Whether to skip malformed records and list them in `bad_records`.

    Yields:
        Each block with its documents, in the order of `blocks` for any number of workers.

    Raises:
        ValueError: A record is malformed and not skipped, or a file is damaged.
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


def _encode(block: DocumentBlock, tokenizer: Tokenizer, skip_bad_records: bool) -> EncodedDocuments:
    bad_records: list[str] = []
    texts = block.texts(bad_records.append if skip_bad_records else None)
    try:
        documents = encode_documents(tokenizer, texts)
    except TokenizationError as error:
        raise ValueError(f"{block.location(error.index)}: {error}") from error
    return dataclasses.replace(documents, bad_records=tuple(bad_records))
