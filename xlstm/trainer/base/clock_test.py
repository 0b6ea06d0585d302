import time

import pytest

from xlstm.trainer.base.clock import Clock


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
