"""Flags that say which processes and devices take part in a run, and how processes end together."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

import jax
from absl import flags
from jax.experimental import multihost_utils

from xlstm.tools.command_line import print_error

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, counted from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes, found out from SLURM or the cloud's environment."
)
_SIMULATE_DEVICES = flags.DEFINE_integer(
    "simulate_devices", None, "Pretend that this CPU is so many devices.", lower_bound=1
)


def initialize_devices() -> None:
    """Connects the processes and simulates devices, as the flags say.

    Raises:
        ValueError: If only a part of the flags for several processes is given, or they contradict.
        OSError: If the processes do not find each other.
    """
    if _SIMULATE_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _SIMULATE_DEVICES.value)
    settings = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if all(setting is None for setting in settings):
        if _DISTRIBUTED.value:
            _connect()
        return
    if any(setting is None for setting in settings):
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id go together; on SLURM and in"
            " clouds that JAX knows, --distributed finds them out"
        )
    if not 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value:
        raise ValueError(
            f"--process_id={_PROCESS_ID.value}: it must be at least 0 and below"
            f" --num_processes={_NUM_PROCESSES.value}"
        )
    _connect(*settings)


def _connect(*settings: str | int) -> None:
    try:
        jax.distributed.initialize(*settings)
    except RuntimeError as error:
        raise OSError(f"the processes cannot be connected: {error}") from error
    # CPU processes give up if one comes half a minute late to their first common computation; here
    # they all are at the same place.
    multihost_utils.sync_global_devices("start")


# The first process leads the others: when it ends, theirs may be ended before they can say why.
_SECONDS_TO_SPEAK = 3


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """In a run of several processes, ends a process that failed at once, and so all of them.

    An orderly end would wait for the other processes, which wait for this one. When its connections
    close, their communication fails, and they end as well.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        message, status = str(error), 2
        if not isinstance(error, (ValueError, OSError, jax.errors.JaxRuntimeError)):
            traceback.print_exc()
            message, status = repr(error), 1
        if isinstance(error, jax.errors.JaxRuntimeError):
            status = 1
            message = (
                f"the computation with the other processes failed ({error}); if one of them has"
                " ended, its output says why; start all of them again, and the run goes on from"
                " its last checkpoint"
            )
        place = f"process {jax.process_index()} of {jax.process_count()}"
        print_error(f"{place}: {message}")
        sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(_SECONDS_TO_SPEAK)
        os._exit(status)
