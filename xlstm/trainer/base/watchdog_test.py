import threading
import time

from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.watchdog import watchdog


def _hang_here(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_says_where_a_run_hangs_once_a_stall():
    clock, reports = Clock(), []
    with watchdog(clock, 0.2, reports.append):
        with clock.phase("data"):
            _hang_here(lambda: reports)
            time.sleep(0.5)
        assert len(reports) == 1
        with clock.phase("checkpoint"):
            _hang_here(lambda: len(reports) > 1)
    first, second = reports
    assert "no progress for 0 s, in the phase 'data'" in first
    assert "_hang_here" in first and "watchdog_test.py" in first
    assert "'checkpoint'" in second


def test_it_is_silent_while_there_is_progress():
    clock, reports = Clock(), []
    with watchdog(clock, 1.0, reports.append):
        for _ in range(150):
            with clock.phase("step"):
                time.sleep(0.01)
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
