"""What only the first of several processes may do, and all have to know."""

import collections
import json
import threading
from collections.abc import Callable
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
        with _lock:
            _uses[key] += 1  # A name serves once.
            name = f"{key}_{_uses[key]}"
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_TIMEOUT_MS)


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
