"""Tests of the clock and the watchdog."""

import threading
import time

import pytest

from xlstm.testing.patience import wait_until
from xlstm.trainer.base import clock as clock_module
from xlstm.trainer.base.clock import Clock, report_waits, watchdog


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def _spend(clock, now, phase, seconds):
    with clock.phase(phase):
        now[0] += seconds


def test_phases_add_up(now):
    clock = Clock()
    now[0] += 7
    for _ in range(2):
        _spend(clock, now, "data", 1)
        _spend(clock, now, "step", 3)
        now[0] += 0.5
    assert clock.seconds() == {"start": 7, "data": 2, "step": 6, "other": 1}
    assert clock.goodput() == 6 / 16


def test_pauses_are_no_training(now):
    clock = Clock()
    for phase in ("start", "compile", "evaluation", "checkpoint"):
        _spend(clock, now, phase, 10)
    for phase in ("data", "step", "other"):
        _spend(clock, now, phase, 1)
    assert clock.training_seconds() == 3


def test_of_phases_in_each_other_the_inner_one_counts(now):
    clock = Clock()
    with clock.phase("evaluation"):
        now[0] += 1
        _spend(clock, now, "data", 5)
        assert clock.current() == ("evaluation", 0)
        now[0] += 1
    assert clock.seconds() == {"start": 0, "evaluation": 2, "data": 5, "other": 0}


def test_a_tick_is_a_sign_of_life_and_costs_no_time(now):
    clock = Clock()
    with clock.phase("evaluation"):
        now[0] += 5
        clock.tick()
        now[0] += 1
        assert clock.current() == ("evaluation", 1)
    assert clock.seconds()["evaluation"] == 6


def test_a_phase_ends_with_an_error(now):
    clock = Clock()
    with pytest.raises(KeyError), clock.phase("step"):
        now[0] += 2
        raise KeyError
    now[0] += 3
    assert clock.current() == ("other", 3)


def test_the_current_phase_and_how_long(now):
    clock = Clock()
    now[0] += 4
    assert clock.current() == ("start", 4)
    with clock.phase("data"):
        now[0] += 2
        assert clock.current() == ("data", 2)


def test_what_the_run_does_is_said_in_words(now):
    clock = Clock()
    now[0] += 4
    assert clock.activity() == ("preparing the run", 4)
    with clock.phase("evaluation"):
        now[0] += 2
        assert clock.activity() == ("compiling the evaluation step", 2)
        clock.tick()  # The first batch is done.
        now[0] += 3
        assert clock.activity() == ("evaluating", 5)
    with clock.phase("evaluation"):
        assert clock.activity() == ("evaluating", 0)
    with clock.phase("compile"):
        now[0] += 6
        assert clock.seconds()["compile"] == 6
        assert clock.activity() == ("compiling the training step", 6)
    assert clock.activity() == ("preparing the next step", 0)
    clock.finish()
    assert clock.activity() == ("writing the last files", 0)


class _WatchedClock(Clock):
    """A clock that knows when a thread looks at it."""

    def __init__(self):
        super().__init__()
        self._num_looks = 0

    def activity(self):
        self._num_looks += 1
        return super().activity()

    def current(self):
        self._num_looks += 1
        return super().current()

    def hang_here(self):
        """Waits until the thread has looked at the clock once more and acted on what it saw."""
        looks = self._num_looks
        # Its next look follows its report.
        wait_until(lambda: self._num_looks >= looks + 2, interval=0.001)


@pytest.fixture
def often(monkeypatch):
    """Makes `report_waits` look often."""
    monkeypatch.setattr(clock_module, "_SECONDS_BETWEEN_LOOKS", 0.001)


def test_long_waits_are_reported_again_and_again(now, often):
    clock, lines = _WatchedClock(), []
    with report_waits(clock, lines.append):
        for phase, seconds in (("step", 100), ("compile", 130), ("checkpoint", 4)):
            with clock.phase(phase):
                for _ in range(seconds):
                    now[0] += 1
                    clock.hang_here()
    expected = [f"compiling the training step: {x} s so far" for x in (1, 10, 30, 60, 120)]
    assert lines == expected


def test_a_short_wait_is_not_reported(now, often):
    clock, lines = _WatchedClock(), []
    with report_waits(clock, lines.append), clock.phase("compile"):
        now[0] += 0.9
        clock.hang_here()
    assert lines == []


def test_it_says_where_a_run_hangs_once_a_stall(now):
    clock, reports = _WatchedClock(), []
    with watchdog(clock, 0.2, reports.append):
        for phase in ("data", "checkpoint"):
            with clock.phase(phase):
                clock.hang_here()
                for _ in range(3):
                    now[0] += 0.3
                    clock.hang_here()
    first, second = reports
    assert "no progress for 0 s, in the phase 'data'" in first
    assert "hang_here" in first and "clock_test.py" in first
    assert "'checkpoint'" in second


def test_it_is_silent_while_there_is_progress(now):
    clock, reports = _WatchedClock(), []
    with watchdog(clock, 0.2, reports.append):
        for _ in range(20):
            with clock.phase("step"):
                now[0] += 0.19
                clock.hang_here()
    assert reports == []


def test_its_thread_ends():
    before = threading.active_count()
    with watchdog(Clock(), 100, lambda text: None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_it_can_be_off():
    before = threading.active_count()
    with watchdog(Clock(), 0, lambda text: None):
        assert threading.active_count() == before
