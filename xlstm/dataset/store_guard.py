"""Verification of token stores against their checksums, before and during a run."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

from xlstm.dataset.store_verification import (
    mark_verified,
    store_identity,
    verification_lock,
    verify_store,
    was_verified,
)
from xlstm.dataset.token_store import TokenStore

# Bytes to verify before the work starts: about 50 ms of one core.
_SMALL = 64 << 20
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_STOP = 5.0
# The coarsest resolution of file times: within it, another write may leave the times unchanged.
_YOUNG_NS = 2 * 10**9


class StoreGuard:
    """A guard that verifies stores once per machine, and again when their files change.

    It is a context manager. Inside, a low-priority thread verifies the remaining stores, then
    checks their files every second for changes. It stores an error as the store's `problem`, which
    reading raises. A file that is replaced stays open, and reading continues from the original.
    """

    def __init__(self, stores: Iterable[TokenStore], report: Callable[[str], None]):
        """Takes the stores.

        Args:
            stores: The stores; duplicates are allowed.
            report: Shows a message to the user.
        """
        self._stores = sorted(dict.fromkeys(stores), key=_num_bytes)
        self._report = report
        self._opened_as = {store: store_identity(store) for store in self._stores}
        self._sound: dict[TokenStore, str] = {}  # The identity with which each was verified.
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="store guard", daemon=True)

    def verify_first(self, everything: bool = False) -> None:
        """Verifies small stores that this machine has not verified before.

        Args:
            everything: Whether to verify all stores: large ones and verified ones too.

        Raises:
            ValueError: A store is damaged.
            OSError: A store cannot be read.
        """
        num_bytes = 0
        for store in self._stores:
            if everything:
                self._report(f"verifying {_describe(store)}")
            elif was_verified(self._opened_as[store]):
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
        """Stops the thread, raises what it found, and reports stores that were not verified."""
        self._end.set()
        self._thread.join(_SECONDS_TO_STOP)  # Limited, because a disk may hang.
        if exc_type is not None:
            return
        for store in self._stores:
            store.check()
            if self._sound.get(store) != store_identity(store):
                self._report(f"{_describe(store)} was not fully verified: use --verify_data")

    def _watch(self) -> None:
        """Verifies stores whose identity is new, in a loop: the work of the thread."""
        if sys.platform == "linux":  # Only there does a thread have its own priority.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._end.is_set():
            for store in self._stores:
                try:
                    self._look_at(store)
                except Exception as error:  # Of any kind: the thread must not lose it.
                    store.problem = error
                    return
            self._end.wait(_SECONDS_BETWEEN_LOOKS)

    def _look_at(self, store: TokenStore) -> None:
        identity = store_identity(store)
        if identity in self._sound.values() or was_verified(identity):
            self._sound[store] = identity
            return
        try:
            with verification_lock(identity) as is_locked:
                if is_locked:  # Otherwise, the other process marks the store or stops the run.
                    self._verify(store, identity)
        except (ValueError, OSError) as error:
            result = "what this run has read from it so far may be wrong"
            if identity != self._opened_as[store]:
                result = f"its files were changed while they were in use, and {result}"
            raise ValueError(f"{error}; {result}") from error

    def _verify(self, store: TokenStore, identity: str) -> None:
        """Verifies a store, and records it if its identity is still the same afterwards."""
        newest = max(max(file.stat_signature[1:3]) for file in store.files.values())
        is_settled = time.time_ns() - newest > _YOUNG_NS
        if not verify_store(store, lambda: not self._end.is_set()):
            return
        if store_identity(store) == identity:
            self._sound[store] = identity
            if is_settled:
                mark_verified(identity)


def _num_bytes(store: TokenStore) -> int:
    return sum(file.num_bytes for file in store.files.values())


def _describe(store: TokenStore) -> str:
    return f"the token store {store.path} ({_num_bytes(store) / 1e9:.1f} GB)"
