"""Tests that exactly the checkpoints that can be read count as complete."""

import os
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from xlstm.common_types import TrainState
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.checksums import write_checksums
from xlstm.trainer.checkpoints.read_params import open_params, read_params

_SIZE = 40


def _state(value):
    def scalar():
        return jnp.zeros((), jnp.int32)

    return TrainState(
        params={"kernel": nn.Partitioned(jnp.full((_SIZE, _SIZE), value), names=(None, None))},
        apply_fn=None,
        tx=None,
        opt_state={"mu": jnp.zeros(_SIZE)},
        step=scalar(),
        rng=jax.random.PRNGKey(0),
        grad_norm_mean=scalar(),
        skipped_steps=scalar(),
    )


def _write(directory, *steps):
    """Writes checkpoints whose kernels hold their steps."""
    with Checkpointer(str(directory), max_to_keep=9) as checkpointer:
        for step in steps:
            checkpointer.save(step, _state(float(step)))


def _restored(directory, step=None):
    with Checkpointer(str(directory)) as checkpointer:
        state = checkpointer.restore(_state(0.0), step)
    (value,) = np.unique(state.params["kernel"].value)
    return value


def _discard_unusable(directory, report=pytest.fail):
    with Checkpointer(str(directory), report=report) as checkpointer:
        return checkpointer.discard_unusable()


def _remove_part(arrays, key):
    """Removes a chunk of an array from the store, as if a process had written elsewhere."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{arrays}/"}}
    database = tensorstore.KvStore.open(spec).result()
    database.delete_range(tensorstore.KvStore.KeyRange(key, key + "\0")).result()


def _wait_for_error(checkpointer):
    """Returns the error of the background thread, as `check_for_errors` raises it."""
    checkpointer._thread.join()
    with pytest.raises(OSError) as caught:
        checkpointer.check_for_errors()
    return str(caught.value)


@pytest.mark.parametrize(
    "key, reason",
    [
        ("params.kernel/0.0", "1 of 1 chunks of the array params.kernel are missing"),
        ("opt_state.mu/0", "1 of 1 chunks of the array opt_state.mu are missing"),
        ("params.kernel/.zarray", "the array params.kernel is missing"),
    ],
)
def test_what_cannot_be_read_never_becomes_a_checkpoint(tmp_path, monkeypatch, key, reason):
    _write(tmp_path, 1, 2)
    finish = ocp.AsyncCheckpointer.wait_until_finished

    def finish_and_lose(self):
        finish(self)
        arrays = tmp_path / "3.unfinished" / "state"
        if arrays.exists():
            _remove_part(arrays, key)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", finish_and_lose)
    checkpointer = Checkpointer(str(tmp_path), max_to_keep=1)
    checkpointer.save(3, _state(3.0))
    assert _wait_for_error(checkpointer) == (
        f"a checkpoint cannot be written to {tmp_path}: reading it back failed: {reason}"
    )
    monkeypatch.undo()
    assert checkpointer.latest_step() == 2
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3.unfinished"]
    assert _discard_unusable(tmp_path, lambda text: None) == 2
    assert _restored(tmp_path) == 2


def test_a_checkpoint_of_older_code_that_lacks_a_part_is_damaged(tmp_path):
    """Its checksums are right, since they are computed from the files as written."""
    directory = tmp_path / "checkpoints"
    _write(directory, 1, 2, 3)
    _remove_part(directory / "3" / "state", "params.kernel/0.0")
    write_checksums(str(directory / "3"))
    reason = "1 of 1 chunks of the array params.kernel are missing"
    reads = {
        "used": [
            lambda: read_params(str(directory), 3, _state(0.0).params),
            lambda: open_params(str(directory), 3, {"kernel": (_SIZE, _SIZE)}),
        ],
        "read": [lambda: _restored(directory, 3)],
    }
    for verb, functions in reads.items():
        for function in functions:
            with pytest.raises(OSError, match=f"step 3 in .* cannot be {verb}: {reason}$"):
                function()
    reports = []
    assert _discard_unusable(directory, reports.append) == 2
    assert f"the checkpoint of step 3 is damaged ({reason}): moved it to " in reports[0]
    assert _restored(directory) == 2
    os.remove(directory / "2" / "state" / "manifest.ocdbt")
    write_checksums(str(directory / "2"))
    assert _discard_unusable(directory, reports.append) == 1
    assert "the checkpoint of step 2 is damaged (NOT_FOUND: Manifest not found)" in reports[1]


@pytest.mark.parametrize("name", ["a[1]", "a*", "b c\td"])
def test_a_path_may_hold_what_patterns_are_made_of(tmp_path, name):
    _write(tmp_path / name, 1, 2)
    assert _discard_unusable(tmp_path / name) == 2
    assert _restored(tmp_path / name) == 2
    params = read_params(str(tmp_path / name), 2, _state(0.0).params)
    assert np.all(params["kernel"].value == 2)


def test_a_path_that_cannot_work_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints cannot be stored in .* \(a backslash"):
        Checkpointer(str(tmp_path / "a\\b"))
    assert not os.listdir(tmp_path)


def test_checkpoints_that_somebody_removes_are_named_and_forgotten(tmp_path):
    reports, folder = [], tmp_path / "checkpoints"
    with Checkpointer(str(folder), max_to_keep=3, report=reports.append) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, _state(1.0), val_loss=float(step))
        checkpointer.wait_until_finished()
        shutil.rmtree(folder / "1")
        checkpointer.save(4, _state(1.0), val_loss=9.0)
        checkpointer.wait_until_finished()
        assert checkpointer.best_loss() == 2.0 and checkpointer.confirmed_step() == 4
        shutil.rmtree(folder)
        checkpointer.save(5, _state(1.0), confirmed=False)
        checkpointer.wait_until_finished()
        assert checkpointer.confirmed_step() is None and checkpointer.latest_step() == 5
        checkpointer.save(6, _state(1.0))
    assert reports == [
        f"{folder} has lost checkpoints that this run did not remove, of step {steps}"
        for steps in ("1", "2, 3, 4")
    ]
    assert sorted(os.listdir(folder)) == ["6"]
