import itertools
import os
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from xlstm.common_types import TrainState
from xlstm.trainer.checkpoints import folder, read_params
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.folder import CheckpointFolder, CheckpointGone
from xlstm.trainer.llm.find_checkpoint import read_checkpoint

_SIZE = 40


def _state(value):
    return TrainState(
        params={"kernel": nn.Partitioned(jnp.full((_SIZE, _SIZE), value), names=(None, None))},
        apply_fn=None,
        tx=None,
        opt_state={},
        step=jnp.zeros((), int),
        rng=jax.random.PRNGKey(0),
        grad_norm_mean=jnp.zeros(()),
        skipped_steps=jnp.zeros((), int),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with six checkpoints; the parameters of each are its step."""
    run = tmp_path_factory.mktemp("saved") / "run"
    directory = str(run / "checkpoints")
    with Checkpointer(directory, max_to_keep=9, run_info={"who": "mine"}) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(step, _state(float(step)))
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run that a test may change."""
    return shutil.copytree(saved, tmp_path / "run")


def _read(workdir, step):
    """Reads everything that the tools read from a checkpoint."""
    assert read_params.read_run_info(workdir.checkpoints, step) == {"who": "mine"}
    params = read_params.read_params(workdir.checkpoints, step, _state(0.0).params)
    opened = read_params.open_params(workdir.checkpoints, step, {"kernel": (_SIZE, _SIZE)})
    assert (opened["kernel"].read().result() == step).all()
    read_params.read_fingerprint(workdir.checkpoints, step)
    assert (params["kernel"].value == step).all()
    return step


_MOMENTS = {
    "before it is read": (CheckpointFolder, "run_info"),
    "before its files are checked": (read_params, "find_damage"),
    "before its arrays are found": (read_params, "read_array_metadata"),
    "before its arrays are read": (read_params, "restore_arguments"),
    "before its arrays are opened": (read_params, "open_streamed_arrays"),
    "before its fingerprint is taken": (read_params, "read_fingerprint"),
}


def _disturb(monkeypatch, owner, name, disturb):
    """Calls `disturb` before every call of a function."""
    function = getattr(owner, name)

    def disturbed(*args, **kwargs):
        disturb()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, disturbed)


def _remove_newest(run, times):
    """Returns a function whose first calls remove the newest checkpoint, as a run does."""
    folder, calls = CheckpointFolder(str(run / "checkpoints")), itertools.count()

    def remove():
        if next(calls) < times:
            folder.remove(folder.steps()[-1:])

    return remove


@pytest.mark.parametrize("moment", _MOMENTS)
def test_when_a_checkpoint_is_removed_another_is_chosen(run, monkeypatch, moment):
    _disturb(monkeypatch, *_MOMENTS[moment], _remove_newest(run, times=2))
    assert read_checkpoint(str(run), _read) == 4


def test_when_the_only_checkpoint_is_replaced_while_it_is_looked_for(run, monkeypatch):
    directory = run / "checkpoints"
    CheckpointFolder(str(directory)).remove(range(1, 6))
    shutil.copytree(directory / "6", run / "7")

    def replace():
        if (directory / "6").exists():
            os.rename(run / "7", directory / "7")
            shutil.rmtree(directory / "6")

    _disturb(monkeypatch, folder, "has_checksums", replace)
    assert read_checkpoint(str(run), lambda workdir, step: step) == 7


def test_another_checkpoint_of_the_same_step_is_not_the_one_that_was_chosen(run, monkeypatch):
    """The run was rolled back, and has reached the step again."""
    checkpoint, done = run / "checkpoints" / "6", []

    def replace():
        if not done:
            done.append(True)
            shutil.copytree(checkpoint, run / "new")
            shutil.rmtree(checkpoint)
            os.rename(run / "new", checkpoint)
            raise OSError("a file is missing")

    _disturb(monkeypatch, read_params, "restore_arguments", replace)
    assert read_checkpoint(str(run), _read) == 6
    assert done


def test_a_run_that_removes_them_all_is_not_followed_for_ever(run, monkeypatch):
    _disturb(monkeypatch, read_params, "restore_arguments", _remove_newest(run, times=99))
    with pytest.raises(OSError, match=r"run: 5 checkpoints were removed while they were read"):
        read_checkpoint(str(run), _read)
    assert CheckpointFolder(str(run / "checkpoints")).steps() == [1]


def test_a_checkpoint_that_was_named_is_not_replaced(run, monkeypatch):
    path = str(run / "checkpoints" / "6")
    assert read_checkpoint(path, _read) == 6
    _disturb(monkeypatch, read_params, "restore_arguments", _remove_newest(run, times=1))
    directory = re.escape(str(run / "checkpoints"))
    with pytest.raises(CheckpointGone, match=rf"^there is no checkpoint of step 6 in {directory} "):
        read_checkpoint(path, _read)


def test_a_damaged_checkpoint_is_told_and_not_replaced(run):
    path, reads = next((run / "checkpoints" / "6").rglob("d/*")), []
    os.truncate(path, 10)

    def read(workdir, step):
        reads.append(step)
        return _read(workdir, step)

    with pytest.raises(OSError, match="step 6 in .* cannot be used: .* has 10 bytes, not the"):
        read_checkpoint(str(run), read)
    assert reads == [6]
