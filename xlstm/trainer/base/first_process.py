"""What only the first of several processes may do, and what all of them have to know."""

import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

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
