"""A rendezvous of a run's processes before JAX connects them.

JAX's own start-up accepts any number of processes, waits for processes that cannot come, and aborts
the rest with a page of addresses. So process 0 first listens at the coordinator's port itself,
until all the processes that it expects have connected.

Each other process sends one line, `{"xlstm": 1, "num_processes": N, "process_id": I}`, and receives
one, `{"xlstm": 1, "error": SENTENCE}`; the sentence is empty if all processes are present.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_HELLO = {"xlstm": 1}
_LONGEST_LINE = 10_000
_SECONDS_FOR_A_LINE = 5
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BETWEEN_REPORTS = 10
_SECONDS_FOR_LATE_GUESTS = 5  # So that processes that start together all receive the error.


def meet(
    address: str,
    num_processes: int,
    process_id: int,
    seconds: float,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Waits until all processes of a run are present.

    Args:
        address: The coordinator's address, host:port.
        num_processes: The number of processes, as this process was told.
        process_id: The index of this process.
        seconds: Seconds that process 0 waits for the others, and they for it.
        report: Called with a line about the reason of a long wait.

    Raises:
        ValueError: If the address is malformed, or the processes were told different numbers; in
            every process that is present.
        OSError: If processes are missing, or the port is taken.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"the coordinator's address is {address}: expected host:port")
    if process_id == 0:
        _Host(int(port), num_processes).receive(seconds, report)
        return
    text = f"process {process_id} waits for process 0 at {address}, and with it for all others"
    timer = threading.Timer(_SECONDS_BETWEEN_REPORTS, report, [text])
    timer.daemon = True
    timer.start()
    try:
        hello = _HELLO | {"num_processes": num_processes, "process_id": process_id}
        _visit(host.strip("[]"), int(port), hello, seconds)
    finally:
        timer.cancel()


class _Host:
    """The server in process 0, which waits for the other processes."""

    def __init__(self, port: int, num_processes: int):
        self._port, self._num_processes = port, num_processes
        self._guests: dict[int, socket.socket] = {}

    def receive(self, seconds: float, report: Callable[[str], None]) -> None:
        """Waits for all processes and answers them."""
        error, begin, reports = "", time.monotonic(), 0
        with self._listen() as server:
            while not error and (missing := self._missing()):
                waited = time.monotonic() - begin
                if waited > seconds:
                    raise OSError(self._dismiss(self._no_show(seconds)))
                if waited > (reports + 1) * _SECONDS_BETWEEN_REPORTS:
                    reports += 1
                    numbers = ", ".join(map(str, missing))
                    report(f"process 0 waits for {numbers} of {self._num_processes} processes")
                error = self._accept(server)
            self._dismiss(error)
            if error:
                deadline = time.monotonic() + _SECONDS_FOR_LATE_GUESTS
                while time.monotonic() < deadline:
                    self._accept(server)
                    self._dismiss(error)
        if error:
            raise ValueError(error)

    def _listen(self) -> socket.socket:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            server = socket.create_server(("", self._port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            reason = os.strerror(error.errno)
            raise OSError(
                f"process 0 cannot listen at port {self._port} ({reason}): stop another"
                " process 0 of this run that listens there, or choose another port, with"
                " --coordinator_address or, under --distributed, JAX_COORDINATOR_PORT"
            ) from error
        server.settimeout(_SECONDS_BETWEEN_TRIES)
        return server

    def _missing(self) -> list[int]:
        """Returns the indices of the processes that are not connected."""
        self._guests = {i: guest for i, guest in self._guests.items() if not _has_left(guest)}
        return [i for i in range(1, self._num_processes) if i not in self._guests]

    def _accept(self, server: socket.socket) -> str:
        """Accepts a connection if one is waiting; returns what is wrong with it, or ""."""
        try:
            guest, _ = server.accept()
        except OSError:
            return ""
        guest.settimeout(_SECONDS_FOR_A_LINE)
        hello = _read(guest)
        number, expected = hello.get("process_id"), hello.get("num_processes")
        if type(number) is not int or type(expected) is not int:
            guest.close()  # It is not a process of a run.
            return ""
        guest.setblocking(False)
        if expected != self._num_processes:
            error = (
                f"process {number} has --num_processes={expected}, process 0 has"
                f" --num_processes={self._num_processes}: start all processes with the same number"
            )
        elif number in self._guests and not _has_left(self._guests[number]):
            error = f"two processes have --process_id={number}: give each its own"
        else:
            error = ""
        # A process whose index is taken is kept under an index that no process has.
        self._guests[-1 if error else number] = guest
        return error

    def _no_show(self, seconds: float) -> str:
        numbers = ", ".join(map(str, self._missing()))
        return (
            f"of {self._num_processes} processes, these have not connected within {seconds:.0f} s:"
            f" {numbers}; start them, or give all processes the right --num_processes"
        )

    def _dismiss(self, error: str) -> str:
        """Sends the answer to all waiting processes; returns it."""
        for guest in self._guests.values():
            with contextlib.suppress(OSError):
                guest.sendall(_line(_HELLO | {"error": error}))
            guest.close()
        self._guests = {}
        return error


def _visit(host: str, port: int, hello: dict[str, Any], seconds: float) -> None:
    """Waits until process 0 listens, and then for its answer."""
    begin, problem = time.monotonic(), "nobody listens"
    while time.monotonic() - begin < seconds:
        try:
            with socket.create_connection((host, port), _SECONDS_FOR_A_LINE) as connection:
                # Process 0 has the same deadline and answers before it, unless its machine is gone
                # or another program listens there.
                connection.settimeout(seconds + _SECONDS_FOR_A_LINE)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.sendall(_line(hello))
                answer = _read(connection)
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        if "error" not in answer:
            problem = "the program that answers there is not a waiting process 0"
            time.sleep(_SECONDS_BETWEEN_TRIES)
        elif answer["error"]:
            raise ValueError(answer["error"])
        else:
            return
    raise OSError(
        f"process 0 cannot be reached at {host}:{port} within {seconds:.0f} s ({problem})"
    )


def _has_left(guest: socket.socket) -> bool:
    try:
        return guest.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _read(connection: socket.socket) -> dict[str, Any]:
    """Reads a line of this protocol; returns {} for anything else."""
    try:
        with connection.makefile("rb") as file:
            content = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and _HELLO.items() <= content.items() else {}
