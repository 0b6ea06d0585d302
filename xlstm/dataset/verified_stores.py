"""Remembers which token stores were verified on this machine, from run to run.

For each there is an empty file in the user's cache, named after the store as it was. Where that
folder cannot be used, nothing is remembered.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

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
