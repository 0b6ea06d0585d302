"""Sees to it that token stores are what their checksums say, at first and while they are used."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

from xlstm.dataset.store_verification import (
    is_remembered,
    remember,
    sole_verifier,
    store_identity,
    verify_store,
)
from xlstm.dataset.token_store import TokenStore

# So many bytes, some 50 ms of one core, are verified before the work begins.
_SMALL = 64 << 20
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_STOP = 5.0
# The times of files are no finer than this everywhere: one that was written just now may be written
# again without showing it.
_YOUNG_NS = 2 * 10**9


class StoreGuard:
    """Verifies stores once a machine, and again when their files change.

    A context manager: inside, a thread of low priority verifies what is not yet, and looks at the
    files every second. What it finds becomes the store's `problem`, which reading raises. A file
    that another took the place of is still open, and read on as it was.
    """

    def __init__(self, stores: Iterable[TokenStore], report: Callable[[str], None]):
        """Takes the stores.

        Args:
            stores: The stores; the same one may come twice.
            report: Shows a text to the user.
        """
        self._stores = sorted(dict.fromkeys(stores), key=_num_bytes)
        self._report = report
        self._opened_as = {store: store_identity(store) for store in self._stores}
        self._sound: dict[TokenStore, str] = {}  # What each was when it was found to be right.
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="store guard", daemon=True)

    def verify_first(self, everything: bool = False) -> None:
        """Verifies small stores that are not known, before the work begins.

        Args:
            everything: Verify all stores, large and known ones too.

        Raises:
            ValueError: A store is damaged.
            OSError: One cannot be read.
        """
        num_bytes = 0
        for store in self._stores:
            if everything:
                self._report(f"verifying {_describe(store)}")
            elif is_remembered(self._opened_as[store]):
                self._sound[store] = self._opened_as[store]
                continue
            num_bytes += _num_bytes(store)
            if everything or num_bytes <= _SMALL:
                self._verify(store, self._opened_as[store])

    def __enter__(self) -> "StoreGuard":
        """Starts the thread."""
        for store in self._stores:
            if store not in self._sound:
                self._report(f"verifying {_describe(store)} in the background")
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        """Ends the thread, and tells what was found since the last look, or was not looked at."""
        self._end.set()
        self._thread.join(_SECONDS_TO_STOP)  # A disk that hangs is not waited for.
        if exc_type is not None:
            return
        for store in self._stores:
            store.check()
            if self._sound.get(store) != store_identity(store):
                self._report(f"{_describe(store)} was not verified to its end: --verify_data does")

    def _watch(self) -> None:
        """Verifies what is not known as it is now, again and again; the thread's work."""
        if sys.platform == "linux":  # Where threads have priorities of their own.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._end.is_set():
            for store in self._stores:
                try:
                    self._look_at(store)
                except Exception as error:  # Any, so that none is lost with the thread.
                    store.problem = error
                    return
            self._end.wait(_SECONDS_BETWEEN_LOOKS)

    def _look_at(self, store: TokenStore) -> None:
        identity = store_identity(store)
        if identity in self._sound.values() or is_remembered(identity):
            self._sound[store] = identity
            return
        try:
            with sole_verifier(identity) as is_sole:
                if is_sole:  # Else the other process remembers the store, or ends the run.
                    self._verify(store, identity)
        except (ValueError, OSError) as error:
            result = "what this run has read of it so far may be wrong"
            if identity != self._opened_as[store]:
                result = f"its files were changed while they were in use, and {result}"
            raise ValueError(f"{error}; {result}") from error

    def _verify(self, store: TokenStore, identity: str) -> None:
        """Verifies a store of some identity, and notes it unless it has another one by then."""
        newest = max(max(file.facts[1:3]) for file in store.files.values())
        is_settled = time.time_ns() - newest > _YOUNG_NS
        if not verify_store(store, lambda: not self._end.is_set()):
            return
        if store_identity(store) == identity:
            self._sound[store] = identity
            if is_settled:
                remember(identity)


def _num_bytes(store: TokenStore) -> int:
    return sum(file.num_bytes for file in store.files.values())


def _describe(store: TokenStore) -> str:
    return f"the token store {store.path} ({_num_bytes(store) / 1e9:.1f} GB)"
