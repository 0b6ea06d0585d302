import numpy as np
import pytest

from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.trainer import Callback, RollBack, Stop, fit, to_scalars


class _Recorder(Callback):
    """Records its calls; due at the steps `due`."""

    def __init__(self, events, due=()):
        self.events, self.due = events, due

    def on_start(self, step, state):
        self.events.append(("start", step, state))

    def is_due(self, step):
        return step in self.due

    def on_metrics(self, step, metrics):
        self.events.append(("metrics", step, metrics["batch"]))

    def on_step(self, step, state):
        self.events.append(("step", step, state))

    def on_end(self, step, state):
        self.events.append(("end", step, state))


def _fit(start_step, num_steps, due=(), more=(), state=()):
    """Trains a state that is the tuple of its batches, which are numbered from 0."""
    events = []
    batches = {"taken": []}

    def batches_from(step):
        for number in range(step, 100):
            batches["taken"].append(number)
            yield np.int64(number)

    def train_step(state, batch):
        events.append(("train", batch))
        return (*state, batch), {"batch": batch}

    state = fit(
        tuple(state),
        batches_from,
        train_step,
        start_step=start_step,
        num_steps=num_steps,
        callbacks=[_Recorder(events, due), *more],
        clock=Clock(),
    )
    return state, events, batches["taken"]


def test_metrics_come_a_step_late():
    state, events, _ = _fit(0, 3)
    assert state == (0, 1, 2)
    assert events == [
        ("start", 0, ()),
        ("train", 0),
        ("train", 1),
        ("metrics", 1, 0),
        ("train", 2),
        ("metrics", 2, 1),
        ("metrics", 3, 2),
        ("end", 3, (0, 1, 2)),
    ]


def test_all_metrics_come_before_what_is_due():
    _, events, _ = _fit(0, 3, due=[2])
    assert events[1:7] == [
        ("train", 0),
        ("train", 1),
        ("metrics", 1, 0),
        ("metrics", 2, 1),
        ("step", 2, (0, 1)),
        ("train", 2),
    ]


def test_each_callback_ends_before_the_next_one_is_called_for_the_last_step():
    first, second = [], []

    class Second(_Recorder):
        def on_step(self, step, state):
            second.append(("step", [event[0] for event in first if event[1] == 3]))

    _fit(0, 3, more=[_Recorder(first), Second([], due=[3])])
    assert second == [("step", ["metrics", "end"])]


def test_a_run_goes_on_where_it_was():
    state, events, taken = _fit(7, 9)
    assert state == (7, 8)
    assert [event[1] for event in events if event[0] == "metrics"] == [8, 9]
    assert taken == [7, 8]  # It takes no batch without training on it.


def test_a_finished_run_takes_no_step():
    state, events, taken = _fit(5, 5)
    assert state == ()
    assert events == [("start", 5, ())]
    assert taken == []


def test_an_error_in_a_callback_ends_the_run():
    class Failing(Callback):
        def on_metrics(self, step, metrics):
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        _fit(0, 3, more=[Failing()])


def test_a_stop_ends_the_run_before_its_time():
    class Stopping(Callback):
        def is_due(self, step):
            return step == 2

        def on_step(self, step, state):
            raise Stop

    state, events, _ = _fit(0, 9, more=[Stopping()])
    assert state == (0, 1)
    assert "end" not in [event[0] for event in events]


@pytest.mark.parametrize("due", [[], [3], [4], [3, 4]])
def test_a_roll_back_goes_on_behind_the_step(due):
    """Step 3 is bad; step 4 may have started when that is known, and is done again."""

    class RollingBack(Callback):
        times = 0

        def on_metrics(self, step, metrics):
            if step == 3 and not self.times:
                self.times += 1
                raise RollBack(lambda state: ("saved",))

    state, events, _ = _fit(0, 6, due=due, more=[RollingBack()])
    assert state == ("saved", 3, 4, 5)
    assert [event[1] for event in events if event[0] == "metrics"] == [1, 2, 3, 4, 5, 6]
    steps = [event for event in events if event[0] == "step"]
    # Callbacks that are due after the bad step get the restored state.
    expected = {3: ("step", 3, ("saved",)), 4: ("step", 4, ("saved", 3))}
    assert steps == [expected[step] for step in due]


def test_metrics_become_numbers():
    row = to_scalars({"loss": (12.0, 8.0), "lr": 1})
    assert row == {"loss": 1.5, "lr": 1.0}
    assert all(type(value) is float for value in row.values())


@pytest.mark.parametrize(
    "field",
    [
        "num_steps",
        "num_minibatches",
        "eval_interval",
        "eval_batches",
        "checkpoint_interval",
        "max_checkpoints",
        "max_skipped_steps",
    ],
)
def test_counts_must_be_positive(field):
    assert getattr(TrainerConfig(**{field: 1}), field) == 1
    with pytest.raises(ValueError, match=rf"trainer\.{field}=0: .* at least 1"):
        TrainerConfig(**{field: 0})


@pytest.mark.parametrize("field", ["max_loss_spike", "max_update_ratio"])
def test_limits_must_be_positive(field):
    assert getattr(TrainerConfig(**{field: 0.1}), field) == 0.1
    with pytest.raises(ValueError, match=rf"trainer\.{field}=0.0: it must be above 0"):
        TrainerConfig(**{field: 0.0})


@pytest.mark.parametrize(
    "field",
    ["seed", "checkpoint_minutes", "keep_checkpoint_interval", "confirm_steps", "stall_seconds"],
)
def test_some_may_be_zero_but_not_negative(field):
    assert getattr(TrainerConfig(**{field: 0}), field) == 0
    with pytest.raises(ValueError, match=rf"trainer\.{field}=-1: .* at least 0"):
        TrainerConfig(**{field: -1})


def test_the_nan_policy_must_be_known():
    with pytest.raises(ValueError, match="nan_policy='ignore' is unknown: .*stop, skip, rollback"):
        TrainerConfig(nan_policy="ignore")
