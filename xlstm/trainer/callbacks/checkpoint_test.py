import jax
import jax.numpy as jnp
import optax
import pytest

from xlstm.common_types import TrainState
from xlstm.trainer.base.checkpointing import Checkpointer
from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.checkpoint import CheckpointCallback


def _state(step):
    state = TrainState.create(
        apply_fn=None,
        params={"kernel": jnp.full(4, float(step))},
        tx=optax.sgd(0.1),
        rng=jax.random.PRNGKey(0),
    )
    return state.replace(step=jnp.int32(step))


def _metrics(step, diverges_at=None):
    return {"loss": (jnp.float32(jnp.nan if step == diverges_at else 1.0), jnp.float32(1.0))}


def _train(directory, start_step, num_steps, interval, diverges_at=None, max_to_keep=9):
    checkpointer = Checkpointer(str(directory), max_to_keep)
    callback = CheckpointCallback(checkpointer, Throughput(), interval)
    try:
        callback.on_start(start_step, _state(start_step))
        for step in range(start_step + 1, num_steps + 1):
            callback.on_step(step, _state(step), _metrics(step, diverges_at))
        callback.on_end(num_steps, _state(num_steps))
    finally:
        checkpointer.close()


def _kept(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _restored_value(directory):
    checkpointer = Checkpointer(str(directory), 9)
    state = checkpointer.restore(_state(-1))
    checkpointer.close()
    return int(state.step), float(state.params["kernel"][0])


@pytest.mark.parametrize(
    "num_steps, interval, expected",
    [(4, 2, [2, 4]), (5, 2, [2, 4, 5]), (1, 10, [1])],
)
def test_every_interval_and_at_the_end(tmp_path, num_steps, interval, expected):
    _train(tmp_path, 0, num_steps, interval)
    assert _kept(tmp_path) == expected
    assert _restored_value(tmp_path) == (num_steps, float(num_steps))


def test_a_run_goes_on_and_a_finished_one_writes_nothing(tmp_path):
    _train(tmp_path, 0, 2, 2)
    _train(tmp_path, 2, 3, 2)
    assert _kept(tmp_path) == [2, 3]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _train(tmp_path, 3, 3, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_state_that_diverged_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="diverged at step 4"):
        _train(tmp_path, 0, 6, 2, diverges_at=4)
    assert _restored_value(tmp_path) == (2, 2.0)
    assert _kept(tmp_path) == [2]


def test_a_state_that_diverged_at_the_end_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="diverged at step 5"):
        _train(tmp_path, 0, 5, 2, diverges_at=5)
    assert _kept(tmp_path) == [2, 4]
