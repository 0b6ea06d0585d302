import contextlib
import socket
import threading
import time
import types

import pytest

from xlstm.testing.patience import PATIENCE
from xlstm.tools import meeting
from xlstm.tools.meeting import meet


@pytest.fixture(autouse=True)
def linger_shortly(monkeypatch):
    monkeypatch.setattr(meeting, "_SECONDS_FOR_LATE_GUESTS", 0.5)


@pytest.fixture
def port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _meet_all(port, *processes, seconds=PATIENCE, report=lambda text: None, errors=None):
    """Lets processes, as (process id, number of processes), meet; returns each one's error."""
    errors = {} if errors is None else errors

    def run(index, process_id, num_processes):
        try:
            meet(f"localhost:{port}", num_processes, process_id, seconds, report)
        except (ValueError, OSError) as error:
            errors[index] = str(error)

    threads = [
        threading.Thread(target=run, args=(index, *process), daemon=True)
        for index, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=PATIENCE)
    return errors


@contextlib.contextmanager
def _connection(port):
    """Connects to process 0 as soon as it listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection(("localhost", port))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with connection:
        yield connection


def test_all_meet_in_any_order(port):
    assert _meet_all(port, (2, 3), (0, 3), (1, 3)) == {}
    assert _meet_all(port, (0, 1)) == {}


@pytest.mark.parametrize("first, second", [(2, 3), (3, 2)])
def test_another_number_of_processes_is_told_to_all(port, first, second):
    errors = _meet_all(port, (0, first), (1, second))
    assert errors == dict.fromkeys(
        range(2),
        f"process 1 has --num_processes={second}, process 0 has --num_processes={first}: start all"
        " processes with the same number",
    )


def test_a_number_taken_twice_is_told_to_all(port):
    errors = _meet_all(port, (0, 3), (1, 3), (1, 3))
    assert errors == dict.fromkeys(range(3), "two processes have --process_id=1: give each its own")


def test_one_that_comes_just_behind_an_error_hears_of_it(port, monkeypatch):
    errors = {}
    # The time that process 0 waits for late processes ends when the last one has heard of it.
    clock = types.SimpleNamespace(monotonic=lambda: 10.0 * (2 in errors), sleep=time.sleep)
    monkeypatch.setattr(meeting, "time", clock)
    _meet_all(port, (0, 3), (1, 2), (2, 3), errors=errors)
    assert len(set(errors.values())) == 1 and len(errors) == 3


def test_those_that_do_not_come_are_named(port):
    errors = _meet_all(port, (0, 4), (2, 4), seconds=2)
    assert errors[0] == errors[1]
    assert errors[0].startswith("of 4 processes, these have not connected within 2 s: 1, 3;")


def test_a_long_wait_says_what_it_is_for(port, monkeypatch):
    monkeypatch.setattr(meeting, "_SECONDS_BETWEEN_REPORTS", 1)
    lines = []
    _meet_all(port, (0, 4), (2, 4), seconds=3, report=lines.append)
    waits = f"process 2 waits for process 0 at localhost:{port}, and with it for all others"
    assert sorted(set(lines)) == ["process 0 waits for 1, 3 of 4 processes", waits]


def test_a_first_process_that_does_not_come(port):
    errors = _meet_all(port, (1, 2), seconds=0.5)
    assert errors[0].startswith(f"process 0 cannot be reached at localhost:{port} within 0 s (")


def test_what_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(meeting, "_SECONDS_FOR_A_LINE", 0.1)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=f"process 0 cannot be reached at {address} within 1 s"):
            meet(address, 2, 1, 1.0)


def test_two_first_processes(port):
    address = f"localhost:{port}"
    first = threading.Thread(target=meet, args=(address, 2, 0, PATIENCE), daemon=True)
    first.start()
    with _connection(port):
        message = rf"process 0 cannot listen at port {port} \(Address already in use\)"
        with pytest.raises(OSError, match=message):
            meet(address, 2, 0, PATIENCE)
    meet(address, 2, 1, PATIENCE)
    first.join(timeout=PATIENCE)
    assert not first.is_alive()


_GUEST = b'{"xlstm": 1, "num_processes": 3, "process_id": 1}\n'


def test_strangers_and_those_that_have_left_do_not_count(port):
    errors = {}

    def come():
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"xlstm": 1}\n', b"", _GUEST):
            with _connection(port) as stranger:
                stranger.sendall(words)
        errors.update(_meet_all(port, (1, 3), (2, 3)))

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    meet(f"localhost:{port}", 3, 0, PATIENCE)
    thread.join()
    assert errors == {}


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:x", "host:0", "host:99999"])
def test_an_address_that_is_none(address):
    with pytest.raises(ValueError, match="expected host:port"):
        meet(address, 2, 0, 1)
