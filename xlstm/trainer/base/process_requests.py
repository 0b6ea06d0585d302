"""What a process may ask of all: to write a checkpoint, or to stop.

Processes must do these after the same step. So a request travels with a training step, whose
metrics say to all of them alike what was asked for.
"""

import enum
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


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
