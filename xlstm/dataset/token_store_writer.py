"""Writes token stores; documents are encoded in several processes."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from xlstm.dataset.base_tokenizer import TextError
from xlstm.dataset.document_block import Block
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

# While some blocks are parsed and counted, the `tokenizers` library encodes others.
_BLOCKS_AT_ONCE = 4


_HASHER = ThreadPoolExecutor(1)


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """Some documents as a store holds them.

    Attributes:
        tokens: `(T,)` ids of all of them, with the markers.
        lengths: `(N,)` int64, tokens per document, the markers included.
        text_bytes: The size of their text in UTF-8.
        num_empty: How many texts had no token and were left out.
        num_characters: The characters of all texts.
        corrections: `(C, 2)` int64, see `TokenStore`; the indices are into `tokens`.
        num_unknown: How many tokens say only that the tokenizer does not know something.
        left_out: The characters of each text that no token stands for, by the text's index among
            all texts.
        bad_records: A message for each malformed record that was left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    num_empty: int
    num_characters: int = 0
    corrections: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    num_unknown: int = 0
    left_out: dict[int, str] = dataclasses.field(default_factory=dict)
    bad_records: tuple[str, ...] = ()


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> EncodedDocuments:
    """Turns texts into documents; a text without any token is left out and counted.

    Args:
        tokenizer: Turns a text into ids.
        texts: One text a document.

    Returns:
        The documents, ready for `TokenStoreWriter.add`.

    Raises:
        ValueError: A text is not valid Unicode.
    """
    texts = list(texts)
    encoded = tokenizer.encode_batch(texts)
    lengths = encoded.lengths[encoded.lengths > 0]
    # A marker in front of each document, and behind it if that is another one.
    num_markers = 1 if tokenizer.bos_id == tokenizer.eod_id else 2
    ends = np.cumsum(lengths)
    tokens = np.empty(encoded.ids.size + num_markers * lengths.size, tokenizer.dtype)
    for number, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
        stop = end + num_markers * number + 1
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
        left_out=encoded.left_out,
    )


class TokenStoreWriter:
    """Writes one token store.

    A context manager: when the block ends well, the store appears at its path, whole and on disk;
    when it ends with an exception, nothing is left. A process that is killed leaves at most a
    folder `<path>.incomplete-...`, which does not open as a store and may be deleted.
    """

    def __init__(self, path: str, tokenizer: Tokenizer):
        """Starts a store.

        Args:
            path: The folder to make; folders above it are made too.
            tokenizer: What the documents are encoded with.

        Raises:
            FolderExistsError: Something is there already; it is never overwritten.
            OSError: The folder cannot be made.
        """
        self.path = os.path.abspath(path)
        self._tokenizer = tokenizer
        self._num_documents = 0
        self._num_tokens = 0
        self._text_bytes = 0
        self._corrections: _HashedFile | None = None  # Made when there is one.
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
        """Finishes the store, or removes all of it after an exception."""
        if exc_type is not None:
            self._cleanup.__exit__(exc_type, exc, traceback)
            return
        with self._cleanup:
            self._finish()

    def add(self, documents: EncodedDocuments) -> None:
        """Appends documents.

        Args:
            documents: What `encode_documents` made with the store's tokenizer.

        Raises:
            ValueError: The ids are not those of documents of this tokenizer.
            OSError: The disk is full, or fails.
        """
        tokens, lengths = documents.tokens, documents.lengths
        if not lengths.size:
            return
        starts = np.cumsum(lengths) - lengths
        ends = starts + lengths - 1
        bos_id, eod_id = self._tokenizer.bos_id, self._tokenizer.eod_id
        in_place = _has_only_at(tokens, bos_id, starts)
        if eod_id != bos_id:
            in_place &= _has_only_at(tokens, eod_id, ends)
        if tokens.dtype != self._tokenizer.dtype or not in_place:
            raise ValueError(
                f"the documents were not encoded with this store's tokenizer "
                f"{self._tokenizer.name}: each must have its markers and hold no other"
            )
        if tokens.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"the documents hold the token {tokens.max()}, the tokenizer "
                f"{self._tokenizer.name} has only {self._tokenizer.vocab_size}"
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
        """Writes what is missing, `meta.json` last."""
        if not self._num_documents:
            raise ValueError(f"no token store {self.path} was made: there is no text in the input")
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
    """Returns whether a token stands at all of some different indices, and nowhere else."""
    is_inside = indices.size == 0 or (indices[0] >= 0 and indices[-1] < tokens.size)
    return (
        is_inside
        and np.count_nonzero(tokens == token_id) == indices.size
        and bool(np.all(tokens[indices] == token_id))
    )


class _HashedFile:
    """A file that is written once, from start to end, and its checksum; a context manager."""

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
        # Both take about as long.
        hashing = _HASHER.submit(self._checksum.update, data)
        try:
            with naming_file(self._path):
                self._file.write(data)
        finally:
            hashing.result()

    def close(self) -> dict[str, int | str]:
        """Puts the file on the disk and returns its entry in `meta.json`."""
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
