import pytest

from xlstm.trainer.base.callback import Callback
from xlstm.trainer.base.trainer import TrainerConfig, fit


class _Recorder(Callback):
    def __init__(self, name, events):
        self.name, self.events = name, events

    def on_start(self, step, state):
        self.events.append((self.name, "start", step, state))

    def on_step(self, step, state, metrics):
        self.events.append((self.name, "step", step, state, metrics))

    def on_end(self, step, state):
        self.events.append((self.name, "end", step, state))


def _train_step(state, batch):
    return state + batch, {"batch": batch}


def _fit(start_step, num_steps, batches):
    events = []
    callbacks = [_Recorder("a", events), _Recorder("b", events), Callback()]
    batches = iter(batches)
    state = fit(
        "s",
        batches,
        _train_step,
        start_step=start_step,
        num_steps=num_steps,
        callbacks=callbacks,
    )
    return state, events, list(batches)


def test_callbacks_are_called_in_order():
    state, events, _ = _fit(0, 2, "xy")
    assert state == "sxy"
    assert events == [
        ("a", "start", 0, "s"),
        ("b", "start", 0, "s"),
        ("a", "step", 1, "sx", {"batch": "x"}),
        ("b", "step", 1, "sx", {"batch": "x"}),
        ("a", "step", 2, "sxy", {"batch": "y"}),
        ("b", "step", 2, "sxy", {"batch": "y"}),
        ("a", "end", 2, "sxy"),
        ("b", "end", 2, "sxy"),
    ]


def test_a_run_goes_on_where_it_was():
    state, events, left = _fit(7, 9, "xyz")
    assert state == "sxy"
    assert [event[2] for event in events if event[:2] == ("a", "step")] == [8, 9]
    assert left == ["z"]  # No batch is taken that is not trained on.


def test_a_finished_run_takes_no_step():
    state, events, left = _fit(5, 5, "x")
    assert state == "s"
    assert [event[1:3] for event in events if event[0] == "a"] == [("start", 5), ("end", 5)]
    assert left == ["x"]


def test_an_error_in_a_callback_ends_the_run():
    class Failing(Callback):
        def on_step(self, step, state, metrics):
            raise ValueError("diverged")

    events = []
    with pytest.raises(ValueError, match="diverged"):
        fit(
            "s",
            iter("xy"),
            _train_step,
            start_step=0,
            num_steps=2,
            callbacks=[Failing(), _Recorder("a", events)],
        )
    assert [event[1] for event in events] == ["start"]


@pytest.mark.parametrize(
    "field",
    [
        "num_steps",
        "num_minibatches",
        "eval_interval",
        "eval_batches",
        "checkpoint_interval",
        "max_checkpoints",
    ],
)
def test_counts_must_be_positive(field):
    assert getattr(TrainerConfig(**{field: 1}), field) == 1
    with pytest.raises(ValueError, match=rf"trainer\.{field}=0: .* at least 1"):
        TrainerConfig(**{field: 0})


def test_the_seed_may_be_zero_but_not_negative():
    assert TrainerConfig(seed=0).seed == 0
    with pytest.raises(ValueError, match=r"trainer\.seed=-1: .* at least 0"):
        TrainerConfig(seed=-1)
