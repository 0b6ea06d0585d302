import math
import time

import pytest

from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.evaluate import EvaluateCallback
from xlstm.trainer.logger.base_logger import Logger, Loggers


class _Recorder(Logger):
    def __init__(self):
        self.rows = []

    def log(self, step, row):
        self.rows.append((step, row))


def _steps_evaluated(start_step, num_steps, interval):
    """Runs a training of which the state is the step; returns where it was evaluated."""
    recorder = _Recorder()
    callback = EvaluateCallback(float, Loggers([recorder]), Throughput(), interval)
    callback.on_start(start_step, start_step)
    for step in range(start_step + 1, num_steps + 1):
        callback.on_step(step, step, {})
    callback.on_end(num_steps, num_steps)
    for step, row in recorder.rows:
        assert row["val_loss"] == step
    return [step for step, _ in recorder.rows]


@pytest.mark.parametrize(
    "start_step, num_steps, interval, expected",
    [
        (0, 20, 10, [0, 10, 20]),
        (0, 25, 10, [0, 10, 20, 25]),
        (0, 5, 10, [0, 5]),
        (0, 3, 1, [0, 1, 2, 3]),
        # A run that goes on has been evaluated at its start: at step 10 here,
        (10, 20, 10, [20]),
        (10, 15, 10, [15]),
        # and a finished run has nothing to add.
        (20, 20, 10, []),
        (25, 25, 10, []),
    ],
)
def test_when(start_step, num_steps, interval, expected):
    assert _steps_evaluated(start_step, num_steps, interval) == expected


@pytest.mark.parametrize("loss, perplexity", [(2.0, math.exp(2.0)), (1e6, math.exp(700))])
def test_perplexity_is_finite(loss, perplexity):
    recorder = _Recorder()
    EvaluateCallback(lambda _: loss, Loggers([recorder]), Throughput(), 1).on_step(1, None, {})
    assert recorder.rows == [(1, {"val_loss": loss, "val_perplexity": perplexity})]


def test_the_clock_stands_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def evaluate(_):
        now[0] += 100.0
        return 1.0

    throughput = Throughput()
    throughput.add(10)
    now[0] += 1.0
    EvaluateCallback(evaluate, Loggers([]), throughput, 1).on_step(1, None, {})
    assert throughput.lap() == 10.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    recorder = _Recorder()
    callback = EvaluateCallback(lambda _: loss, Loggers([recorder]), Throughput(), 1)
    with pytest.raises(ValueError, match="step 3 .*val_loss"):
        callback.on_step(3, None, {})
    assert recorder.rows == []  # It would be no JSON.
