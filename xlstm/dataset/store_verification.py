"""Verification of a token store, and the record of the stores that this machine verified."""

import bisect
import contextlib
import fcntl
import hashlib
import os
import platform
from collections.abc import Callable, Iterator

import numpy as np

from xlstm.dataset.file_array import FileArray
from xlstm.dataset.store_meta import TOKENS_FILE
from xlstm.dataset.token_store import META_FILE, TokenStore
from xlstm.dataset.tokenizer import TOKENIZER_FILE
from xlstm.files import Checksum

_FOLDER = ("xlstm", "verified_stores")


def was_verified(identity: str) -> bool:
    """Returns whether this machine has verified the store with a `store_identity`."""
    return os.path.exists(_path(identity))


def mark_verified(identity: str) -> None:
    """Records that a store was verified, if the cache can be written."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(_path(identity)), exist_ok=True)
        with open(_path(identity), "wb"):
            pass


@contextlib.contextmanager
def verification_lock(identity: str) -> Iterator[bool]:
    """Locks the verification of a store against other processes of this machine.

    Args:
        identity: The `store_identity` of the store.

    Yields:
        Whether this process holds the lock, until the end of the block. Where locks are impossible,
        every process holds it.
    """
    path = f"{_path(identity)}.verifying"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "wb")
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # The file system has no locks.
            pass
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)


def _path(identity: str) -> str:
    """Returns the path of a store's record in the user's cache, as XDG defines it."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # XDG says to ignore relative paths.
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # There is no home directory.
        cache = os.devnull  # No file can be created below it.
    return os.path.join(cache, *_FOLDER, identity)


# Bytes: large, to spend little time in Python, yet small enough for the CPU's caches.
_PIECE = 1 << 21


def verify_store(store: TokenStore, keep_going: Callable[[], bool] = lambda: True) -> bool:
    """Verifies the checksums of a store's files, and every token.

    Args:
        store: The store.
        keep_going: Returns whether to continue; called before each piece of a file.

    Returns:
        Whether it finished.

    Raises:
        ValueError: The store is damaged, or its tokens are not documents of its tokenizer.
        OSError: A file cannot be read.
    """
    files = dict(store.files)  # The files that the tokens are checked against come first.
    if TOKENIZER_FILE in store.meta.files:
        files[TOKENIZER_FILE] = FileArray(os.path.join(store.path, TOKENIZER_FILE), np.uint8)
    for name, file in files.items():
        checksum, step = Checksum(), _PIECE // file.dtype.itemsize
        document = 0
        for first in range(0, len(file), step):
            if not keep_going():
                return False
            piece = file[first : first + step]
            checksum.update(piece.view(np.uint8))
            if name == TOKENS_FILE:
                document = _check_tokens(store, piece, first, document)
        if checksum.sha256 != store.meta.files[name]["sha256"]:
            raise ValueError(
                f"the token store {store.path} is damaged: the SHA-256 of {name} is "
                f"{checksum.sha256}, {META_FILE} says {store.meta.files[name]['sha256']}"
            )
    return True


def store_identity(store: TokenStore) -> str:
    """Returns a hash that any change of the store's files changes, but moving the store does not.

    It covers the version of the check, the machine, `meta.json` and the state of the files.
    """
    signatures = [file.stat_signature for file in store.files.values()]
    content = repr(("1", platform.node(), store.meta.to_json(), signatures))
    return hashlib.sha256(content.encode()).hexdigest()


def _check_tokens(store: TokenStore, ids: np.ndarray, first: int, document: int) -> int:
    """Checks the ids and markers of a piece of a store.

    Args:
        store: The store.
        ids: The piece.
        first: The index of its first token in the store.
        document: The index of the first document that starts in or after the piece.

    Returns:
        The index of the first document that starts after the piece.

    Raises:
        ValueError: An id is too large, or the markers are not at the ends of documents.
    """
    meta, stop = store.meta, first + ids.size
    if ids.max() >= meta.vocab_size:
        index = int(np.argmax(ids >= meta.vocab_size))
        problem = f"the largest id of its tokenizer is {meta.vocab_size - 1}"
        raise _bad_token(store, first + index, ids[index], problem)
    next_document = bisect.bisect_left(store.documents, stop, lo=document)
    edges = store.documents[document : next_document + 1] - first
    markers = [(meta.bos_id, edges[(0 <= edges) & (edges < ids.size)])]
    rule = f"documents start with the marker {meta.bos_id}, which occurs nowhere else"
    if meta.eod_id != meta.bos_id:
        markers.append((meta.eod_id, edges[(0 < edges) & (edges <= ids.size)] - 1))
        rule = (
            f"documents start with {meta.bos_id} and end with {meta.eod_id}, which occur nowhere"
            " else"
        )
    for marker, positions in markers:
        is_marker = ids == marker
        if np.count_nonzero(is_marker) != positions.size or not is_marker[positions].all():
            is_marker[positions] ^= True  # Now True where the token is wrong.
            index = int(np.argmax(is_marker))
            raise _bad_token(store, first + index, ids[index], rule)
    return next_document


def _bad_token(store: TokenStore, index: int, token_id: np.generic, problem: str) -> ValueError:
    document = bisect.bisect_right(store.documents, index) - 1
    start, stop = store.documents[document : document + 2]
    return ValueError(
        f"the token store {store.path} is damaged, or was not written with its tokenizer: token "
        f"{index:,} of {TOKENS_FILE} (document {document:,}, tokens {start:,} to {stop - 1:,}) "
        f"is {token_id}, but {problem}"
    )
