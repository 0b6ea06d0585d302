import time

import pytest

from xlstm.trainer.base.clock import Clock
from xlstm.trainer.callbacks.evaluate import EvaluateCallback
from xlstm.trainer.logger.base_logger import Logger


class _Recorder(Logger):
    def __init__(self):
        self.rows = []

    def log(self, step, row):
        self.rows.append((step, row))


def _steps_evaluated(start_step, num_steps, interval):
    """Runs a training whose state is the step; returns the steps of its evaluations."""
    recorder, told = _Recorder(), []
    callback = EvaluateCallback(
        lambda state: {"val_loss": float(state), "val_loss_wiki": 0.0},
        recorder,
        Clock(),
        interval,
        lambda *args: told.append(args),
    )
    callback.on_start(start_step, start_step)
    for step in range(start_step + 1, num_steps + 1):
        if callback.is_due(step):
            callback.on_step(step, step)
    callback.on_end(num_steps, num_steps)
    for step, row in recorder.rows:
        assert row == {"val_loss": step, "val_loss_wiki": 0.0}
    assert told == [(step, float(step)) for step, _ in recorder.rows]
    return [step for step, _ in recorder.rows]


@pytest.mark.parametrize(
    "start_step, num_steps, interval, expected",
    [
        (0, 20, 10, [0, 10, 20]),
        (0, 25, 10, [0, 10, 20, 25]),
        (0, 5, 10, [0, 5]),
        (0, 3, 1, [0, 1, 2, 3]),
        # A resumed run has been evaluated at its first step,
        (10, 20, 10, [20]),
        (10, 15, 10, [15]),
        # and a finished run at its last one.
        (20, 20, 10, []),
        (25, 25, 10, []),
    ],
)
def test_when(start_step, num_steps, interval, expected):
    assert _steps_evaluated(start_step, num_steps, interval) == expected


def test_the_time_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def evaluate(_):
        now[0] += 100.0
        return {"val_loss": 1.0}

    class Slow(Logger):
        def log(self, step, row):
            now[0] += 10.0

    EvaluateCallback(evaluate, Slow(), clock, 1).on_step(1, None)
    assert clock.seconds()["evaluation"] == 110.0


def test_without_a_held_out_set_the_first_named_one_decides():
    told = []
    EvaluateCallback(
        lambda state: {"val_loss_wiki": 2.0, "val_perplexity_wiki": 7.4, "val_loss_books": 3.0},
        _Recorder(),
        Clock(),
        1,
        lambda *args: told.append(args),
    ).on_step(4, None)
    assert told == [(4, 2.0)]


def test_an_error_is_not_logged():
    def evaluate(_):
        raise ValueError("the model has diverged")

    recorder = _Recorder()
    with pytest.raises(ValueError, match="diverged"):
        EvaluateCallback(evaluate, recorder, Clock(), 1).on_step(3, None)
    assert recorder.rows == []
