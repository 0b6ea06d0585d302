"""Compares token stores with their checksums, and remembers which were."""

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


def is_remembered(identity: str) -> bool:
    """Returns whether a store was verified before, by its `store_identity`."""
    return os.path.exists(_path(identity))


def remember(identity: str) -> None:
    """Remembers that a store was verified, if that is possible."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(_path(identity)), exist_ok=True)
        with open(_path(identity), "wb"):
            pass


@contextlib.contextmanager
def sole_verifier(identity: str) -> Iterator[bool]:
    """Gives one process of this machine at a time the task to verify a store.

    Args:
        identity: The store's.

    Yields:
        Whether it is this process, until the end of the block. It is, too, where processes cannot
        know of each other.
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
        except OSError:  # This disk knows no locks.
            pass
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)


def _path(identity: str) -> str:
    """Returns the path of a store's file, in what the XDG standard says is the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # To be ignored, says the standard.
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # Nobody's home.
        cache = os.devnull  # In which there can be no file.
    return os.path.join(cache, *_FOLDER, identity)


# Bytes: large, so that little of the time is spent in Python; but the caches hold them.
_PIECE = 1 << 21


def verify_store(store: TokenStore, is_wanted: Callable[[], bool] = lambda: True) -> bool:
    """Compares the checksums of a store's files, and looks at every token.

    Args:
        store: The store.
        is_wanted: Asked again and again whether to go on.

    Returns:
        Whether it came to the end.

    Raises:
        ValueError: The store is damaged, or its tokens are not those of documents of its tokenizer.
        OSError: A file cannot be read.
    """
    files = dict(store.files)  # What the tokens are judged by comes before them.
    if TOKENIZER_FILE in store.meta.files:
        files[TOKENIZER_FILE] = FileArray(os.path.join(store.path, TOKENIZER_FILE), np.uint8)
    for name, file in files.items():
        checksum, step = Checksum(), _PIECE // file.dtype.itemsize
        document = 0
        for first in range(0, len(file), step):
            if not is_wanted():
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
    """Returns a name for the store as it is, wherever it lies: another one after any change.

    It says what was checked, by which machine, and which files in which state.
    """
    facts = [file.facts for file in store.files.values()]
    content = repr(("1", platform.node(), store.meta.to_json(), facts))
    return hashlib.sha256(content.encode()).hexdigest()


def _check_tokens(store: TokenStore, ids: np.ndarray, first: int, document: int) -> int:
    """Checks the ids and markers of a piece of a store.

    Args:
        store: The store.
        ids: The piece.
        first: Where it begins.
        document: The number of the first document that begins in it or behind.

    Returns:
        The number of the first document that begins behind the piece.

    Raises:
        ValueError: An id is too large, or the markers are not where documents begin and end.
    """
    meta, stop = store.meta, first + ids.size
    if ids.max() >= meta.vocab_size:
        index = int(np.argmax(ids >= meta.vocab_size))
        problem = f"the ids of its tokenizer end at {meta.vocab_size - 1}"
        raise _bad_token(store, first + index, ids[index], problem)
    next_document = bisect.bisect_left(store.documents, stop, lo=document)
    edges = store.documents[document : next_document + 1] - first
    markers = [(meta.bos_id, edges[(0 <= edges) & (edges < ids.size)])]
    rule = f"documents begin with the marker {meta.bos_id}, which is nowhere else"
    if meta.eod_id != meta.bos_id:
        markers.append((meta.eod_id, edges[(0 < edges) & (edges <= ids.size)] - 1))
        rule = (
            f"documents begin with {meta.bos_id} and end with {meta.eod_id}, which are nowhere else"
        )
    for marker, places in markers:
        is_marker = ids == marker
        if np.count_nonzero(is_marker) != places.size or not is_marker[places].all():
            is_marker[places] ^= True  # Now where it is not as it should be.
            index = int(np.argmax(is_marker))
            raise _bad_token(store, first + index, ids[index], rule)
    return next_document


def _bad_token(store: TokenStore, index: int, token_id: np.generic, problem: str) -> ValueError:
    document = bisect.bisect_right(store.documents, index) - 1
    begin, end = store.documents[document : document + 2]
    return ValueError(
        f"the token store {store.path} is damaged, or was not written with its tokenizer: token "
        f"{index:,} of {TOKENS_FILE} (document {document:,}, which runs from {begin:,} to "
        f"{end - 1:,}) is {token_id}, but {problem}"
    )
