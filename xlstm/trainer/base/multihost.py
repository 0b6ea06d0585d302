"""Coordination of a run's processes: barriers, broadcasts, a shared folder, stop requests."""

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

_TIMEOUT_MS = 2 * 60 * 60 * 1000  # Checking a large checkpoint takes long.
_uses, _lock = collections.Counter(), threading.Lock()

_MARKER_PREFIX = ".seen_by_all_processes."
_MARKER_SECONDS = 15  # Some network file systems show other machines' files late.


def sync_processes(key: str) -> None:
    """Waits until all processes have called this; may be called from any thread.

    The wait may last longer than a collective computation may.

    Args:
        key: Name of the barrier; threads that wait at the same time need different keys.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=_unique_name(key), timeout_ms=_TIMEOUT_MS)


def broadcast_from_process_0(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and returns its result in all processes.

    The result travels through the devices: all processes must call this between the same
    computations.

    Args:
        function: Returns a value that JSON can represent.

    Returns:
        The function's result.

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
    sync_processes("broadcast_from_process_0")
    content = json.dumps([answer, error and str(error)]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = np.frombuffer(content.ljust(size)[:size], np.uint8)
    answer, message = json.loads(bytes(multihost_utils.broadcast_one_to_all(content)))
    if message is not None:
        raise OSError(message) from error
    return answer


def run_on_process_0(key: str, function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and returns its result in all processes, from any thread.

    The result travels through JAX's coordinator; the other processes wait for it.

    Args:
        key: Name of the call; threads that wait at the same time need different keys.
        function: Returns a value that JSON can represent.

    Returns:
        The function's result.

    Raises:
        Exception: In process 0, whatever the function raises.
        OSError: In every other process, if the function raises anything.
    """
    if jax.process_count() == 1:
        return function()
    client, name = ocp.multihost.get_jax_distributed_client(), _unique_name(key)
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
def raise_on_all_processes() -> Iterator[None]:
    """Raises an OSError in every process if the block raises one in any of them.

    All processes must enter the block, and none may wait for another one inside.

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
            raise OSError(f"process {failed.argmax()} of {len(failed)} failed: see its message")
    if error is not None:
        raise error


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the global value of an array; all processes that hold a shard must call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _unique_name(key: str) -> str:
    """Returns a name that is used once and is the same in all processes."""
    with _lock:
        _uses[key] += 1
        return f"{key}_{_uses[key]}"


def check_shared_folder(path: str) -> None:
    """Checks that a path is the same folder in all processes.

    Process 0 creates a file with a random name there. No process can have looked up that name
    before, so no cache of a network file system can give a wrong answer.

    Args:
        path: The folder; no other run may use it at the same time.

    Raises:
        OSError: In every process, if one of them does not see the file within some seconds.
    """
    if jax.process_count() == 1:
        return
    file = os.path.join(path, broadcast_from_process_0(lambda: _create_marker(path)))
    sees = np.ravel(multihost_utils.process_allgather(np.bool_(_appears(file))))
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            os.remove(file)
    if not sees.all():
        raise OSError(
            f"process {sees.argmin()} of {len(sees)} does not see a file that process 0 created in"
            f" {path}: the run's folder must be shared by all processes"
        )


def _create_marker(path: str) -> str:
    """Creates an empty file with a random name, and removes those that killed processes left."""
    for name in glob.glob(f"{_MARKER_PREFIX}*", root_dir=path):
        os.remove(os.path.join(path, name))
    name = _MARKER_PREFIX + secrets.token_hex(16)
    with open(os.path.join(path, name), "x"):
        return name


def _appears(file: str) -> bool:
    deadline = time.monotonic() + _MARKER_SECONDS
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Request(enum.IntEnum):
    """A request of a process to the run; a larger value includes the smaller ones."""

    NONE = 0
    CHECKPOINT = 1
    STOP = 2


class Requests:
    """The requests of this process, as an input of the training step."""

    def __init__(self, mesh: Mesh):
        """Creates one array per request; the current request is `NONE`.

        Args:
            mesh: The mesh of the training step.
        """
        self._arrays = {request: _on_every_device(mesh, request) for request in Request}
        self._pending, self._lock = Request.NONE, threading.Lock()

    def ask(self, request: Request) -> None:
        """Adds a request; may be called from any thread."""
        with self._lock:
            self._pending = max(self._pending, request)

    def current(self) -> jax.Array:
        """Returns the input of the next step, `(number of devices,)` int32."""
        return self._arrays[self._pending]

    def answered(self, request: Request) -> None:
        """Drops the pending request unless it is larger than the one that was answered.

        Every step carries the request until then, since a step may be rolled back.
        """
        with self._lock:
            if self._pending <= request:
                self._pending = Request.NONE


def _on_every_device(mesh: Mesh, request: Request) -> jax.Array:
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    value = np.full(1, request, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: value)
