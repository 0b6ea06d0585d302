"""What the processes of a run do together."""

import collections
import contextlib
import enum
import glob
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_TIMEOUT_MS = 2 * 60 * 60 * 1000  # Checking a large checkpoint takes its time.
_uses, _lock = collections.Counter(), threading.Lock()


def wait_for_all(key: str) -> None:
    """Waits until all processes are here; from any thread, and for longer than a computation may.

    Args:
        key: What the processes wait for; threads that wait at the same time need keys of their own.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=_new_name(key), timeout_ms=_TIMEOUT_MS)


def _new_name(key: str) -> str:
    """A name that serves once, the same in all processes."""
    with _lock:
        _uses[key] += 1
        return f"{key}_{_uses[key]}"


def in_first_process(key: str, function: Callable[[], Any]) -> Any:
    """Calls a function in the first process only, for which the others wait; from any thread.

    Args:
        key: Names what is done; threads that wait at the same time need keys of their own.
        function: What to do; it returns what JSON can hold.

    Returns:
        What it returned there.

    Raises:
        OSError: In every other process, if the function raises anything.
    """
    if jax.process_count() == 1:
        return function()
    client, name = ocp.multihost.get_jax_distributed_client(), _new_name(key)
    if jax.process_index() == 0:
        answer = message = None
        try:
            answer = function()
        except Exception as error:
            message = str(error) or repr(error)
            raise
        finally:
            client.key_value_set(name, json.dumps([answer, message]))
    else:
        answer, message = json.loads(client.blocking_key_value_get(name, _TIMEOUT_MS))
        if message is not None:
            raise OSError(message)
    return answer


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raises an OSError of a block that all processes go through in every one of them.

    No process may wait for another one in the block.

    Raises:
        OSError: If the block raises one, in this process or another.
    """
    error = None
    try:
        yield
    except OSError as caught:
        error = caught
    if jax.process_count() > 1:
        failed = np.ravel(multihost_utils.process_allgather(np.bool_(error is not None)))
        if error is None and failed.any():
            raise OSError(f"process {failed.argmax()} of {len(failed)} failed, and says why")
    if error is not None:
        raise error


def from_first_process(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process only, and tells all processes what came of it.

    Args:
        function: Returns what JSON can hold.

    Returns:
        What it returned there.

    Raises:
        OSError: In every process, if the function raises one.
    """
    if jax.process_count() == 1:
        return function()
    answer = error = None
    if jax.process_index() == 0:
        try:
            answer = function()
        except OSError as caught:
            error = caught
    wait_for_all("from_first_process")
    content = json.dumps([answer, error and str(error)]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = np.frombuffer(content.ljust(size)[:size], np.uint8)
    answer, message = json.loads(bytes(multihost_utils.broadcast_one_to_all(content)))
    if message is not None:
        raise OSError(message) from error
    return answer


_PREFIX = ".seen_by_all_processes."
_SECONDS = 15  # Some network file systems show other machines' files late.


def check_shared_folder(path: str) -> None:
    """Checks that a folder of the first process is that of all processes.

    The first process makes a file there, whose name nobody can know or have asked for before. So
    the others see it only in this very folder, whatever they remember of a network file system.

    Args:
        path: The folder; the first process must have it for itself.

    Raises:
        OSError: In every process, if one of them does not see the file within some seconds.
    """
    if jax.process_count() == 1:
        return
    file = os.path.join(path, from_first_process(lambda: _make_file(path)))
    sees = np.ravel(multihost_utils.process_allgather(np.bool_(_appears(file))))
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            os.remove(file)
    if not sees.all():
        raise OSError(
            f"process {sees.argmin()} of {len(sees)} does not see what the first process makes in"
            f" {path}: the folder of the run must be one that all processes share"
        )


def _make_file(path: str) -> str:
    """Makes an empty file with a new name, and removes those that killed processes left."""
    for name in glob.glob(f"{_PREFIX}*", root_dir=path):
        os.remove(os.path.join(path, name))
    name = _PREFIX + secrets.token_hex(16)
    with open(os.path.join(path, name), "x"):
        return name


def _appears(file: str) -> bool:
    deadline = time.monotonic() + _SECONDS
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Request(enum.IntEnum):
    """In the order of their weight: of several, the largest is answered."""

    NONE = 0
    CHECKPOINT = 1
    STOP = 2


class Requests:
    """The requests of this process, as an input of the training step."""

    def __init__(self, mesh: Mesh):
        """Makes the arrays that stand for the requests; nothing is asked for."""
        self._arrays = {request: _on_every_device(mesh, request) for request in Request}
        self._pending, self._lock = Request.NONE, threading.Lock()

    def ask(self, request: Request) -> None:
        """Asks; from any thread."""
        with self._lock:
            self._pending = max(self._pending, request)

    def current(self) -> jax.Array:
        """The input of the next step, `(number of devices,)` int32."""
        return self._arrays[self._pending]

    def answered(self, request: Request) -> None:
        """Forgets what was asked for, unless it weighs more than the request that was answered.

        Until then every step carries it: one that is rolled back would have taken it away.
        """
        with self._lock:
            if self._pending <= request:
                self._pending = Request.NONE


def _on_every_device(mesh: Mesh, request: Request) -> jax.Array:
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    value = np.full(1, request, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: value)


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole of an array; all processes that have a part of it must ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
