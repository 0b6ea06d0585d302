"""Flags that say which processes and devices take part in a run, and how processes end together."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from xlstm.tools.command_line import print_error
from xlstm.tools.meeting import meet
from xlstm.trainer.base import coordinator
from xlstm.trainer.base.coordinator import check_agreement
from xlstm.trainer.llm.run_facts import SAME_COMMAND, device_facts, environment_facts

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, counted from 0.")
_CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds", 300, "How long to wait for processes that come late.", lower_bound=1
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes, found out from SLURM or the cloud's environment."
)
_SIMULATE_DEVICES = flags.DEFINE_integer(
    "simulate_devices", None, "Pretend that this CPU is so many devices.", lower_bound=1
)
# Each process has its own. Of a configuration every field is compared, and of a folder its content.
_OWN_FLAGS = {"coordinator_address", "process_id", "connect_seconds", "config", "workdir"}


def initialize_devices() -> None:
    """Connects the processes and simulates devices, as the flags say.

    Processes that differ in flags, code, packages or devices end here.

    Raises:
        ValueError: If only a part of the flags for several processes is given, they contradict, or
            those of the other processes do.
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
    meet(*settings, _CONNECT_SECONDS.value)
    _connect(*settings)


def _connect(*settings: str | int) -> None:
    seconds = _CONNECT_SECONDS.value
    try:
        # JAX's own patience ends with an abort and a page of addresses.
        with _giving_up_after(seconds):
            jax.distributed.initialize(*settings, initialization_timeout=seconds + 60)
    except RuntimeError as error:
        raise OSError(f"the processes cannot be connected: {error}") from error
    if jax.default_backend() == "cpu":
        # JAX keeps the programs of process 0 alone; beside one that another process has compiled
        # anew, a program out of the cache was seen to wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)
    with abort_all_on_failure():
        check_agreement("start", lambda: {SAME_COMMAND: _shared_flags()} | environment_facts())
        check_agreement("devices", device_facts)
        # CPU processes give up if one comes half a minute late to their first common computation;
        # here they all are at the same place.
        multihost_utils.sync_global_devices("start")


def _shared_flags() -> dict[str, Any]:
    """The flags of this tool, which all processes must have in common."""
    by_module = flags.FLAGS.flags_by_module_dict()
    ours = [module for module in by_module if module.startswith("xlstm.") or module == sys.argv[0]]
    return {
        f"--{flag.name}": flag.value
        for module in sorted(ours)
        for flag in by_module[module]
        if flag.name not in _OWN_FLAGS
    }


@contextlib.contextmanager
def _giving_up_after(seconds: int) -> Iterator[None]:
    def give_up() -> None:
        print_error(f"the processes have not found each other within {seconds} s")
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# The first process leads the others: when it ends, theirs may be ended before they can say why.
_SECONDS_TO_SPEAK = 3
_SECONDS_BETWEEN_LOOKS = 0.5
_END = "end"


@contextlib.contextmanager
def abort_all_on_failure() -> Iterator[None]:
    """In a run of several processes, ends a process that failed at once, and so all of them.

    An orderly end would wait for the other processes, which wait for this one. The process tells
    them why it ends, and they end as well with its words. Of one that was killed they learn when
    its connections close and their communication fails.
    """
    if coordinator.num_processes() == 1:
        yield
        return
    ending = threading.Lock()  # Whoever has it speaks for the process, and ends it.
    with _watching_others(lambda status, message: _end(ending, status, message)):
        try:
            yield
        except Exception as error:
            _end(ending, *_explain(error))
        except SystemExit as error:
            _end(ending, error.code if isinstance(error.code, int) else 1, "it was told to end")


def _explain(error: Exception) -> tuple[int, str]:
    """The exit status and the message that an error is worth."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _end_of_another() or (
            1,
            f"the computation with the other processes failed ({error}); if one of them has"
            " ended, its output says why; start all of them again, and the run goes on from"
            " its last checkpoint",
        )
    if isinstance(error, (ValueError, OSError)):
        return 2, str(error)
    traceback.print_exc()
    return 1, repr(error)


def _end(ending: threading.Lock, status: int, message: str) -> None:
    ending.acquire()
    place = f"process {coordinator.process_id()} of {coordinator.num_processes()}"
    print_error(f"{place}: {message}")
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # The coordinator may be gone.
        coordinator.tell(_END, f"{status} {message}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if coordinator.process_id() == 0:
        time.sleep(_SECONDS_TO_SPEAK)
    os._exit(status)


def _end_of_another() -> tuple[int, str] | None:
    """The exit status and the words of a process that has ended already, if there is one."""
    try:
        ends = coordinator.told_by_all(_END)
    except jax.errors.JaxRuntimeError:
        return None
    for process, text in ends.items():
        status, _, message = text.partition(" ")
        return int(status), f"process {process} has ended: {message}"
    return None


@contextlib.contextmanager
def _watching_others(end: Callable[[int, str], None]) -> Iterator[None]:
    """While inside, a thread ends this process when another one says that it ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if found := _end_of_another():
                end(*found)

    thread = threading.Thread(target=watch, name="processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
