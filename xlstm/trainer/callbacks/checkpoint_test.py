import itertools
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from xlstm.common_types import TrainState
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.multihost import Request, Requests
from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.base.trainer import Callback, RollBack, fit
from xlstm.trainer.callbacks import checkpoint
from xlstm.trainer.callbacks.checkpoint import CheckpointCallback
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.folder import CheckpointFolder


def _state(step):
    state = TrainState.create(
        apply_fn=None,
        params={"kernel": jnp.full(4, float(step))},
        tx=optax.sgd(0.1),
        rng=jax.random.PRNGKey(0),
        grad_norm_mean=jnp.float32(0),
        skipped_steps=jnp.int32(0),
    )
    return state.replace(step=jnp.int32(step))


@pytest.fixture
def requests():
    return Requests(create_mesh(MeshConfig()))


def _soundness():
    return Soundness(confirm_steps=3, max_loss_spike=2.0, max_update_ratio=1.0)


class _Validation(Callback):
    """Sets the validation losses of some steps."""

    def __init__(self, callback, losses):
        self._callback, self._losses = callback, losses

    def is_due(self, step):
        return step in self._losses

    def on_step(self, step, state):
        self._callback.set_val_loss(step, self._losses[step])


@pytest.fixture
def train(tmp_path, requests):
    """A function that trains with the callback, and returns the steps that are kept."""

    def train(
        start_step,
        num_steps,
        interval,
        asked=(),
        val_losses=(),
        keep_best=False,
        callbacks=(),
        **options,
    ):
        asked = dict(asked)

        def train_step(state, batch):
            metrics, step = {"request": requests.current()[0]}, int(state.step) + 1
            for request in asked.pop(step, []):
                requests.ask(request)
            return _state(step), metrics

        with Checkpointer(str(tmp_path), max_to_keep=9, keep_best=keep_best) as checkpointer:
            callback = CheckpointCallback(
                checkpointer, Clock(), requests, _soundness(), interval=interval, **options
            )
            fit(
                _state(start_step),
                lambda step: itertools.repeat(()),
                train_step,
                start_step=start_step,
                num_steps=num_steps,
                callbacks=[*callbacks, _Validation(callback, dict(val_losses)), callback],
                clock=Clock(),
            )
        return sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())

    return train


def _restored_value(directory):
    with Checkpointer(str(directory)) as checkpointer:
        state = checkpointer.restore(_state(-1))
    return int(state.step), float(state.params["kernel"][0])


@pytest.mark.parametrize(
    "num_steps, interval, expected",
    [(4, 2, [2, 4]), (5, 2, [2, 4, 5]), (1, 10, [1])],
)
def test_every_interval_and_at_the_end(tmp_path, train, num_steps, interval, expected):
    assert train(0, num_steps, interval) == expected
    assert _restored_value(tmp_path) == (num_steps, float(num_steps))


def test_a_run_goes_on_and_a_finished_one_writes_nothing(tmp_path, train):
    train(0, 2, 2)
    assert train(2, 3, 2) == [2, 3]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(3, 3, 2) == [2, 3]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_request_is_answered_as_soon_as_all_know_of_it(train):
    # A request during step 3 travels with step 4, whose metrics arrive after step 5 has started.
    assert train(0, 9, 100, asked={3: [Request.CHECKPOINT]}) == [6, 9]


def test_a_stop_comes_after_a_checkpoint(tmp_path, train):
    assert train(0, 9, 100, asked={3: [Request.CHECKPOINT, Request.STOP]}) == [6]
    assert _restored_value(tmp_path) == (6, 6.0)


@pytest.mark.parametrize("bad, expected", [(3, [6]), (4, [7])])
def test_a_request_outlives_the_roll_back_of_its_step(train, bad, expected):
    """Step 4 carries it; it has started when step 3 is found to be bad, or is bad itself."""

    class RollingBack(Callback):
        times = 0

        def on_metrics(self, step, metrics):
            if step == bad and not self.times:
                self.times += 1
                raise RollBack(lambda state: _state(bad))

    asked = {3: [Request.STOP]}
    assert train(0, 9, 100, asked=asked, callbacks=[RollingBack()]) == expected


def test_after_some_minutes_there_is_one(train, monkeypatch):
    now = [0.0]

    def monotonic():
        now[0] += 20.0  # Called once per step, and once per checkpoint.
        return now[0]

    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=monotonic))
    # They have passed at the metrics of step 4, after step 5 has started: step 6 carries it.
    assert train(0, 17, 100, minutes=1.0) == [8, 16, 17]


def test_minutes_count_from_the_last_checkpoint_whatever_its_reason(train, monkeypatch):
    times = iter(range(0, 10_000, 20))
    clock = types.SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(checkpoint, "time", clock)
    # They have passed when step 5 has started, which has a checkpoint anyway; also at step 10.
    assert train(0, 11, 5, minutes=1.0) == [5, 10, 11]


def test_the_best_is_kept(train):
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.9}
    assert train(0, 9, 100, val_losses=losses, best_interval=2, keep_best=True) == [2, 4, 8, 9]


def test_without_a_wish_the_best_is_not_written(train):
    assert train(0, 5, 100, val_losses={2: 3.0, 4: 2.0}) == [5]


def test_a_checkpoint_says_whether_the_steps_before_it_were_sound(tmp_path, requests):
    soundness, good = _soundness(), dict.fromkeys(("grad_norm", "param_norm", "update_norm"), 1.0)
    with Checkpointer(str(tmp_path), max_to_keep=9) as checkpointer:
        callback = CheckpointCallback(checkpointer, Clock(), requests, soundness, interval=1)
        for step, loss in enumerate([1.0, 1.0, 9.0, 1.0, 1.0, 1.0], start=1):
            soundness.judge(good | {"loss": loss, "skipped": 0.0})
            callback.on_step(step, _state(step))
        checkpointer.wait_until_finished()
        assert checkpointer.confirmed_step() == 6
        assert checkpointer.soundness(6) == soundness.to_dict()
    saved = CheckpointFolder(str(tmp_path)).metadata()
    assert [step for step in saved if saved[step].confirmed] == [1, 2, 6]


def test_a_failure_in_the_background_is_told_at_the_next_step(requests):
    class Failing:
        def check_for_errors(self):
            raise OSError("disk full")

    callback = CheckpointCallback(Failing(), Clock(), requests, _soundness(), interval=5)
    with pytest.raises(OSError, match="disk full"):
        callback.is_due(3)
