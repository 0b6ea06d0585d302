import math
import time

import jax
import pytest

from xlstm.trainer.base.clock import Clock
from xlstm.trainer.callbacks import metrics as metrics_module
from xlstm.trainer.callbacks.metrics import MetricsCallback, device_memory
from xlstm.trainer.logger.base_logger import Logger


class _Recorder(Logger):
    def __init__(self):
        self.rows, self.steps = [], []

    def log(self, step, row):
        self.rows.append((step, row))

    def progress(self, step):
        self.steps.append(step)


def _callback(recorder, clock, interval=1):
    return MetricsCallback(
        recorder,
        clock,
        interval=interval,
        tokens_before=lambda step: 100 * step,
        flops_per_token=60,
        matmul_rate=12_000.0,
        constants={"bubble_fraction": 0.25},
    )


def test_rows_are_logged_with_speeds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics_module, "peak_flops", lambda: 60_000.0)
    recorder, clock = _Recorder(), Clock()
    callback = _callback(recorder, clock, interval=2)
    now[0] = 60.0  # Compiling and restoring, before the start.
    callback.on_start(4, None)
    for step in (5, 6, 7, 8, 9):
        for phase, seconds in (("step", 0.75), ("data", 0.25), ("checkpoint", 10.0)):
            with clock.phase(phase):
                now[0] += seconds
        callback.on_metrics(step, {"loss": step / 2, "skipped": 0.0, "request": 1.0})
    assert recorder.steps == [5, 6, 7, 8, 9]
    same = {
        "tokens_per_second": 100.0,
        "tokens_per_second_per_device": 100.0 / jax.device_count(),
        "matmul_fraction": 0.5,
        "mfu": 0.1,
        "bubble_fraction": 0.25,
    }
    expected = [
        (6, {"loss": 3.0, "tokens": 600, "goodput": 1.5 / 82} | same),
        (8, {"loss": 4.0, "tokens": 800, "goodput": 3.0 / 104} | same),
    ]
    for (step, row), (expected_step, expected_row) in zip(recorder.rows, expected, strict=True):
        assert row.pop("peak_memory") > 0.01
        assert (step, row) == (expected_step, pytest.approx(expected_row))


def test_rows_say_when_nobody_sees_the_terminal(monkeypatch):
    recorder = _Recorder()
    callback = _callback(recorder, Clock())
    for step, is_lost in enumerate([False, True, False], 1):
        monkeypatch.setattr(metrics_module, "is_output_lost", lambda is_lost=is_lost: is_lost)
        callback.on_metrics(step, {"loss": 1.0})
    assert [row.get("terminal_lost") for _, row in recorder.rows] == [None, 1, None]


def test_a_row_that_is_not_due_is_logged_if_its_step_was_left_out():
    recorder = _Recorder()
    callback = _callback(recorder, Clock(), interval=10)
    callback.on_start(0, None)
    callback.on_metrics(1, {"loss": 2.0, "skipped": 0.0, "skipped_steps": 0.0})
    callback.on_metrics(2, {"loss": math.nan, "skipped": 1.0, "skipped_steps": 1.0, "lr": 0.1})
    assert recorder.rows == [(2, {"skipped_steps": 1.0, "lr": 0.1})]


def test_rows_hold_finite_numbers_only():
    recorder = _Recorder()
    callback = _callback(recorder, Clock())
    callback.on_start(0, None)
    callback.on_metrics(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "skipped": 1.0})
    ((_, row),) = recorder.rows
    assert "loss" not in row and "grad_norm" not in row and row["lr"] == 0.1
    assert all(map(math.isfinite, row.values()))


@pytest.mark.parametrize("stats, peak", [(None, None), ({}, None), ({"peak_bytes_in_use": 7}, 7)])
def test_what_a_device_counts(monkeypatch, stats, peak):
    device = type("Device", (), {"memory_stats": lambda self: stats})()
    monkeypatch.setattr(metrics_module.jax, "local_devices", lambda: [device])
    assert metrics_module.peak_device_bytes() == peak


def test_without_an_accelerator_it_is_the_memory_of_the_process():
    assert 0.01 < device_memory()["peak_memory"] < 100
