"""Flags for the processes and devices of a run, and how all processes end when one fails."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.kernel_errors import kernel_problem
from xlstm.tools.cluster_environment import Cluster, find_cluster
from xlstm.tools.command_line import print_error, print_line, project_flags
from xlstm.tools.meeting import meet
from xlstm.trainer.base import coordinator
from xlstm.trainer.base.clock import in_thread
from xlstm.trainer.base.coordinator import check_agreement
from xlstm.trainer.llm.run_facts import SAME_COMMAND, device_facts, environment_facts

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "Address of process 0, host:port, for a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, counted from 0.")
_CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds", 300, "Seconds to wait for all processes to connect.", lower_bound=1
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Runs several processes, whose number and addresses come from the environment: of SLURM,"
    " Open MPI, Cloud TPUs, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_SIMULATE_DEVICES = flags.DEFINE_integer(
    "simulate_devices", None, "Number of devices to simulate on the CPU.", lower_bound=1
)
# Flags that may differ between processes. A configuration is compared field by field, and a folder
# by its content.
_OWN_FLAGS = {"coordinator_address", "process_id", "connect_seconds", "config", "workdir"}


def initialize_devices() -> None:
    """Connects the processes and simulates devices, as the flags say.

    Processes that differ in flags, code, packages or devices end here.

    Raises:
        ValueError: If the flags for several processes are incomplete, or contradict each other or
            the flags of other processes.
        OSError: If the processes cannot connect to each other.
    """
    if _SIMULATE_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _SIMULATE_DEVICES.value)
    settings = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    is_given = [setting is not None for setting in settings]
    if _DISTRIBUTED.value:
        if any(is_given):
            raise ValueError(
                "--distributed takes the processes from the environment: give either it, or"
                " --coordinator_address, --num_processes and --process_id"
            )
        _connect(find_cluster(_CONNECT_SECONDS.value))
        return
    if not any(is_given):
        return
    if not all(is_given):
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id go together: give all three,"
            " or only --distributed, under srun, mpirun, or with JAX's variables"
        )
    if not 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value:
        raise ValueError(
            f"--process_id={_PROCESS_ID.value}: expected at least 0 and less than"
            f" --num_processes={_NUM_PROCESSES.value}"
        )
    _connect(Cluster(*settings, local_device_ids=None))


def _connect(cluster: Cluster) -> None:
    address, num_processes, process_id, local_device_ids = cluster
    seconds = _CONNECT_SECONDS.value
    meet(address, num_processes, process_id, seconds, print_line)
    try:
        # JAX's own timeout aborts the process with a page of addresses.
        with _giving_up_after(seconds):
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=seconds + 60,
            )
    except RuntimeError as error:
        raise OSError(f"the processes cannot be connected: {error}") from error
    if jax.default_backend() == "cpu":
        # JAX caches the programs of process 0 only. A cached program there and a newly compiled one
        # in another process can deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
    with abort_all_on_failure():
        check_agreement("start", lambda: {SAME_COMMAND: _shared_flags()} | environment_facts())
        check_agreement("devices", device_facts)
        # CPU processes fail if one joins their first common computation half a minute late. Here
        # they all are at the same point.
        multihost_utils.sync_global_devices("start")


def _shared_flags() -> dict[str, Any]:
    """Returns the flags of this tool that must be equal in all processes."""
    return {f"--{x.name}": x.value for x in project_flags() if x.name not in _OWN_FLAGS}


@contextlib.contextmanager
def _giving_up_after(seconds: int) -> Iterator[None]:
    def give_up() -> None:
        print_error(f"the processes have not connected to each other within {seconds} s")
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# Process 0 is the coordinator: when it exits, JAX may end the others before they report why.
_SECONDS_TO_SPEAK = 3
_SECONDS_BETWEEN_LOOKS = 0.5
_END = "end"


@contextlib.contextmanager
def abort_all_on_failure() -> Iterator[None]:
    """Aborts all processes of a run when one of them fails inside.

    An orderly exit would deadlock: it waits for the other processes, which wait for this one.
    Instead the process tells the others why it fails and exits at once, and they exit with its
    message. If a process is killed, the others notice when their connections to it close and their
    communication fails.
    """
    if coordinator.num_processes() == 1:
        yield
        return
    ending = threading.Lock()  # Its holder reports the error and exits.
    with _watching_others(lambda status, message: _end(ending, status, message)):
        try:
            yield
        except Exception as error:
            _end(ending, *_explain(error))
        except SystemExit as error:
            _end(ending, error.code if isinstance(error.code, int) else 1, "it was told to exit")


def _explain(error: Exception) -> tuple[int, str]:
    """Returns the exit status and the message for an error."""
    if problem := kernel_problem(error):
        return 2, problem
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _end_of_another() or (
            1,
            f"the computation with the other processes failed ({error}); if one of them has"
            " exited, its output says why; start all of them again to resume from the last"
            " checkpoint",
        )
    if isinstance(error, (ValueError, OSError)):
        return 2, str(error)
    traceback.print_exc()
    return 1, repr(error)


def _end(ending: threading.Lock, status: int, message: str) -> None:
    ending.acquire()
    process = f"process {coordinator.process_id()} of {coordinator.num_processes()}"
    print_error(f"{process}: {message}")
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # The coordinator may be gone.
        coordinator.publish(_END, f"{status} {message}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if coordinator.process_id() == 0:
        time.sleep(_SECONDS_TO_SPEAK)
    os._exit(status)


def _end_of_another() -> tuple[int, str] | None:
    """Returns the exit status and message of a process that has exited already, if any."""
    try:
        ends = coordinator.published_by_all(_END)
    except jax.errors.JaxRuntimeError:
        return None
    for process, text in ends.items():
        status, _, message = text.partition(" ")
        # It may have ended because of a third one.
        is_passed_on = re.match(r"process \d+ has ended: ", message)
        return int(status), message if is_passed_on else f"process {process} has ended: {message}"
    return None


@contextlib.contextmanager
def _watching_others(end: Callable[[int, str], None]) -> Iterator[None]:
    """Ends this process during the block, in a thread, when another one reports that it exits."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if found := _end_of_another():
                end(*found)

    with in_thread("processes", watch, done):
        yield
