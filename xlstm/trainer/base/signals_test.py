import os
import signal
import subprocess
import sys
import time

import pytest

from xlstm.testing.patience import PATIENCE, wait_until
from xlstm.trainer.base import signals
from xlstm.trainer.base.signals import on_stop_signal, stop_message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks(number):
    names = []
    with on_stop_signal(names.append):
        os.kill(os.getpid(), number)
        wait_until(lambda: names)
    assert names == [number.name]


def test_other_signals_do_nothing():
    names, handled = [], []
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    try:
        with on_stop_signal(names.append):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: handled)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert names == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_are_ignored_stay_so(number):
    names, before = [], signal.signal(number, signal.SIG_IGN)
    try:
        with on_stop_signal(names.append):
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: names)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert names == ["SIGTERM"]


def test_a_terminal_may_say_several_times_that_it_is_gone():
    names = []
    with on_stop_signal(names.append):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: names)
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert names == ["SIGHUP"]


def test_two_sigterms_of_one_scheduler_are_one(monkeypatch):
    monkeypatch.setattr(signals, "_SECONDS_OF_ONE_REQUEST", PATIENCE)
    names = []
    with on_stop_signal(names.append):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: names)
            time.sleep(0.05)
    assert names == ["SIGTERM"]


def test_afterwards_all_is_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with on_stop_signal(lambda name: None):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


# A computation in C that Python's own handlers cannot interrupt: they wait for its end.
_STUCK = """
import hashlib

from xlstm.trainer.base.signals import on_stop_signal

with on_stop_signal(lambda name: print(name, flush=True)):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_even_a_process_that_hangs(second):
    process = subprocess.Popen([sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        assert process.poll() is None
        if second == signal.SIGTERM:  # At least a second later.
            time.sleep(1.1)
        process.send_signal(second)
        assert process.wait(timeout=PATIENCE) == 128 + second
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "name, again",
    [
        ("SIGINT", "press Ctrl-C again"),
        ("SIGTERM", "send SIGTERM again"),
        ("SIGHUP", "send SIGTERM twice"),
    ],
)
def test_a_signal_is_answered_with_what_the_run_waits_for(name, again):
    message = stop_message(name, "compiling the training step", 12.3)
    assert message == (
        f"{name} received: the run saves a checkpoint within a few steps and stops"
        " (now compiling the training step, 12 s so far);"
        f" {again} to stop at once without a checkpoint"
    )
