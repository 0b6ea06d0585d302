import contextlib
import errno
import functools
import json
import math
import os
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.testing.full_disk import full_disk
from xlstm.trainer.base.param_utils import reboxed, unboxed
from xlstm.trainer.base.train_state import create_train_state
from xlstm.trainer.checkpoints import folder
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.checksums import write_checksums
from xlstm.trainer.checkpoints.read_params import read_run_info

_SIZE = 256


class _Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(1.0), (None, "tp"))
        kernel = self.param("kernel", init, (_SIZE, _SIZE), unbox=False).value
        return x @ kernel + self.param("bias", nn.initializers.zeros, (_SIZE,))


_MODEL = _Model()
_OPTIMIZER = optax.adamw(1e-2)


@functools.cache
def _created(seed, optimizer, with_ema, **sizes):
    return create_train_state(
        init_params=lambda rng: _MODEL.init(rng, jnp.zeros((1, _SIZE)))["params"],
        apply_fn=_MODEL.apply,
        optimizer=optimizer,
        rng=jax.random.PRNGKey(seed),
        mesh=create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1]),
        with_ema=with_ema,
    )[0]


def _create(seed=0, optimizer=_OPTIMIZER, with_ema=False, **sizes):
    """Returns a state that may be consumed."""
    return jax.tree.map(jnp.copy, _created(seed, optimizer, with_ema, **sizes))


def _step(state):
    params = unboxed(state.params)
    grads = jax.tree.map(lambda x: 1e-2 * x + 1, params)
    updates, opt_state = state.tx.update(grads, state.opt_state, params)
    params = reboxed(optax.apply_updates(params, updates), state.params)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        grad_norm_mean=state.grad_norm_mean + 0.5,
        skipped_steps=state.skipped_steps + 2,
    )


# With donation a step overwrites the arrays of the state before it, as in training.
_donating_step = jax.jit(_step, donate_argnums=0)


def _arrays(state):
    """Copies a state's arrays to the host, in their boxes."""
    return jax.tree.map(np.array, jax.device_get(state))


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    found, expected = _arrays(found), _arrays(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)


def _write(directory, *steps, val_losses=None, **options):
    """Writes checkpoints of a short training; returns the arrays of each."""
    state, arrays = _create(), {}
    with Checkpointer(str(directory), **options) as checkpointer:
        for step in range(1, max(steps) + 1):
            state = _donating_step(state)
            if step in steps:
                arrays[step] = _arrays(state)
                checkpointer.save(step, state, (val_losses or {}).get(step))
    return arrays


def _steps(directory):
    return {int(name) for name in os.listdir(directory)}


def _files(directory):
    return [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]


def _biggest_file(directory):
    return max(_files(directory), key=os.path.getsize)


def _flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def _wait_for_error(checkpointer):
    """Returns the error of the background thread, as `check_for_errors` raises it."""
    checkpointer._thread.join()
    with pytest.raises(OSError) as caught:
        checkpointer.check_for_errors()
    return str(caught.value)


def _discard_unusable(directory, report=pytest.fail):
    with Checkpointer(str(directory), report=report) as checkpointer:
        found = checkpointer.discard_unusable()
        assert checkpointer.latest_step() == found
    return found


@pytest.fixture
def like():
    return _create(seed=1)


def test_everything_comes_back_bit_by_bit(tmp_path, like):
    arrays = _write(tmp_path / "checkpoints", 3)
    rng = np.array(like.rng)  # `restore` consumes `like`.
    with Checkpointer(str(tmp_path / "checkpoints")) as checkpointer:
        assert checkpointer.latest_step() == 3
        found = checkpointer.restore(like)
    _assert_same(found, arrays[3])
    assert (int(found.step), float(found.grad_norm_mean), int(found.skipped_steps)) == (3, 1.5, 6)
    assert np.any(rng != found.rng)
    # The next step is the same as in an uninterrupted run.
    _assert_same(_donating_step(found), jax.jit(_step)(arrays[3]))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, like):
    with Checkpointer(str(tmp_path)) as checkpointer:
        state = _donating_step(_create())
        arrays = jax.tree.map(jnp.copy, state)  # A view on the host would keep the arrays alive.
        checkpointer.save(1, state)
        for _ in range(20):
            before, state = state, _donating_step(state)
            checkpointer.check_for_errors()
        assert before.params["kernel"].value.is_deleted()
        _assert_same(checkpointer.restore(like), arrays)  # `restore` waits.


def test_any_mesh_reads_what_another_wrote(tmp_path):
    arrays = _write(tmp_path, 1)
    other = _create(seed=1, with_ema=True, dp=2, tp=4)
    with Checkpointer(str(tmp_path)) as checkpointer:
        found = checkpointer.restore(other)
    _assert_same(found.replace(params_ema=None), arrays[1])
    # Optimizer and average are sharded like the parameters, and are separate arrays.
    for tree in (found.params, found.params_ema, found.opt_state[0].mu):
        kernel = unboxed(tree)["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (_SIZE, _SIZE // 4)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, other)
    _assert_same(found.params_ema, arrays[1].params)
    found.params["kernel"].value.delete()
    assert np.array(found.params_ema["kernel"].value).shape == (_SIZE, _SIZE)


def test_the_average_of_the_parameters(tmp_path, like):
    state = _create(seed=2, with_ema=True)
    expected = _arrays(state.replace(params_ema=jax.tree.map(lambda x: x + 1, state.params)))
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(1, jax.tree.map(jnp.array, expected))
        _assert_same(checkpointer.restore(_create(with_ema=True)), expected)
        _assert_same(checkpointer.restore(like), expected.replace(params_ema=None))


def test_what_is_kept(tmp_path, like):
    losses = {1: 9.0, 2: 2.0, 3: 3.0, 5: math.nan, 6: 2.5}
    options = {"max_to_keep": 2, "keep_period": 4, "keep_best": True}
    arrays = _write(tmp_path, *range(1, 8), val_losses=losses, **options)
    assert _steps(tmp_path) == {2, 4, 6, 7}
    with Checkpointer(str(tmp_path), **options) as checkpointer:
        assert checkpointer.latest_step() == 7
        assert checkpointer.best_loss() == 2.0
        _assert_same(checkpointer.restore(like, step=4), arrays[4])
        with pytest.raises(OSError, match="there is no checkpoint of step 5 in "):
            checkpointer.restore(like, step=5)
        checkpointer.save(8, _create(), val_loss=1.5)
        checkpointer.wait_until_finished()
        assert (checkpointer.latest_step(), checkpointer.best_loss()) == (8, 1.5)
    assert _steps(tmp_path) == {4, 7, 8}
    # A permanent checkpoint stays permanent without the option.
    with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
        checkpointer.save(9, _create())
    assert _discard_unusable(tmp_path) == 9
    assert _steps(tmp_path) == {4, 8, 9}


def test_an_old_checkpoint_that_cannot_be_removed_is_no_reason_to_stop(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    reports = []
    monkeypatch.setattr(folder.shutil, "rmtree", fail)
    _write(tmp_path, 1, 2, max_to_keep=1, report=reports.append)
    assert len(reports) == 1
    assert re.search("an old checkpoint cannot be removed .*Permission denied", reports[0])
    assert _discard_unusable(tmp_path, reports.append) == 2
    assert re.search("leftovers of a checkpoint cannot be removed .*denied", reports[1])
    monkeypatch.undo()
    assert _discard_unusable(tmp_path) == 2
    assert _steps(tmp_path) == {2}


def test_nothing_is_removed_before_a_newer_one_is_whole(tmp_path, monkeypatch):
    seen = []

    def write(folder):
        seen.append({int(name) for name in os.listdir(tmp_path) if name.isdigit()})
        write_checksums(folder)

    monkeypatch.setattr(folder, "write_checksums", write)
    _write(tmp_path, 1, 2, 3, max_to_keep=1)
    assert seen == [set(), {1}, {2}]
    assert _steps(tmp_path) == {3}


def test_what_is_known_of_the_run(tmp_path):
    _write(tmp_path, 1, run_info={"config": {"a": [1, 2]}, "code": "v1"})
    assert read_run_info(str(tmp_path), 1) == {"config": {"a": [1, 2]}, "code": "v1"}
    with pytest.raises(OSError, match="there is no checkpoint of step 2 in "):
        read_run_info(str(tmp_path), 2)


def test_without_checkpoints(tmp_path, like):
    assert _discard_unusable(tmp_path / "none") is None
    with Checkpointer(str(tmp_path / "none")) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.best_loss() is None
        with pytest.raises(OSError, match="there is no checkpoint in .*none"):
            checkpointer.restore(like)


def test_what_a_killed_run_left_unfinished_does_not_count(tmp_path):
    _write(tmp_path, 1, 2, 3, max_to_keep=3)
    shutil.move(tmp_path / "1", tmp_path / "1.removed")
    shutil.move(tmp_path / "3", tmp_path / "3.unfinished")
    with Checkpointer(str(tmp_path)) as checkpointer:
        assert checkpointer.latest_step() == 2
    reports = []
    assert _discard_unusable(tmp_path, reports.append) == 2
    assert reports == ["removed the checkpoint of step 3, which was not finished"]
    assert _steps(tmp_path) == {2}
    assert not (tmp_path.parent / "damaged_checkpoints").exists()


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_anew(tmp_path):
    _write(tmp_path, 1)
    shutil.move(tmp_path / "1", tmp_path / "1.unfinished")
    assert _discard_unusable(tmp_path, lambda text: None) is None


def test_every_flipped_byte_is_found(tmp_path):
    _write(tmp_path, 1)
    generator = np.random.default_rng(0)
    for path in _files(tmp_path):
        for position in {0, os.path.getsize(path) - 1, generator.integers(os.path.getsize(path))}:
            _flip(path, position)
            name = os.path.relpath(path, tmp_path / "1")
            with pytest.raises(OSError, match=f"every .* damaged .step 1: {name} has other bytes"):
                _discard_unusable(tmp_path)
            _flip(path, position)
    assert _discard_unusable(tmp_path) == 1


def test_damaged_checkpoints_are_set_aside(tmp_path, like):
    directory = tmp_path / "checkpoints"
    arrays = _write(directory, 1, 2, 3, 4, max_to_keep=4)
    os.truncate(_biggest_file(directory / "4"), 1000)
    os.remove(_biggest_file(directory / "3"))
    os.remove(directory / "2" / "checksums.json")
    (tmp_path / "damaged_checkpoints" / "3").mkdir(parents=True)
    reports = []
    assert _discard_unusable(directory, reports.append) == 1
    aside = tmp_path / "damaged_checkpoints"
    patterns = [
        rf"the checkpoint of step 4 is damaged \(state/\S+ has 1,000 bytes, not the [\d,]+ that "
        rf"were written\): moved it to {aside}/4; using the checkpoint of step 1",
        rf"the checkpoint of step 3 is damaged \(state/\S+ is missing\): .* {aside}/3-2; .*",
        rf"the checkpoint of step 2 is damaged \(checksums.json is missing\): .* {aside}/2; .*",
    ]
    for report, pattern in zip(reports, patterns, strict=True):
        assert re.fullmatch(pattern, report)
    assert _files(aside / "4") and _files(aside / "3-2")
    with Checkpointer(str(directory)) as checkpointer:
        _assert_same(checkpointer.restore(like), arrays[1])
    # Without a usable checkpoint a run does not start from scratch by itself.
    _flip(_biggest_file(directory), 0)
    for _ in range(2):
        with pytest.raises(OSError, match="every checkpoint in .* is damaged .*start from scratch"):
            _discard_unusable(directory)


def _write_unconfirmed(directory, *steps, first_unconfirmed):
    with Checkpointer(str(directory), max_to_keep=9) as checkpointer:
        for step in steps:
            is_confirmed = step < first_unconfirmed
            checkpointer.save(step, _create(), confirmed=is_confirmed, soundness={"step": step})


def test_a_run_goes_on_from_the_newest_confirmed_checkpoint(tmp_path):
    directory, aside = tmp_path / "checkpoints", tmp_path / "unconfirmed_checkpoints"
    _write_unconfirmed(directory, 1, 2, 3, 4, first_unconfirmed=3)
    assert _steps(directory) == {1, 2, 4}
    _flip(_biggest_file(directory / "2"), 0)
    reports = []
    with Checkpointer(str(directory), report=reports.append) as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.confirmed_step()) == (4, 2)
        assert checkpointer.discard_unusable() == checkpointer.confirmed_step() == 1
        assert checkpointer.soundness(1) == {"step": 1}
    assert reports[0] == (
        "the checkpoint of step 4 is not confirmed, since steps before it were not sound: moved it"
        f" to {aside}/4; using the checkpoint of step 1"
    )
    assert "the checkpoint of step 2 is damaged" in reports[1]
    assert _steps(directory) == {1} and _steps(aside) == {4}


def test_without_a_confirmed_checkpoint_a_run_does_not_begin_anew(tmp_path):
    _write_unconfirmed(tmp_path, 1, 2, first_unconfirmed=1)
    for _ in range(2):
        with pytest.raises(OSError, match="step 2: steps before it .*confirm_steps=0 to resume"):
            _discard_unusable(tmp_path)
    assert _steps(tmp_path) == {2}
    with Checkpointer(str(tmp_path), only_confirmed=False) as checkpointer:
        assert checkpointer.discard_unusable() == 2


def test_a_damaged_confirmed_checkpoint_leaves_the_unconfirmed_ones_where_they_are(tmp_path):
    _write_unconfirmed(tmp_path, 1, 2, first_unconfirmed=2)
    _flip(_biggest_file(tmp_path / "1"), 0)
    message = r"no checkpoint .* \(step 1: state/\S+ has other bytes .*; step 2: steps before it"
    with pytest.raises(OSError, match=message):
        _discard_unusable(tmp_path)
    assert _steps(tmp_path) == {1, 2}


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_an_error_in_one_sentence(tmp_path, like, damage):
    _write(tmp_path, 1)
    path = _biggest_file(tmp_path)
    if damage == "missing":
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    with (
        pytest.raises(OSError, match=f"the checkpoint of step 1 in {tmp_path} cannot be read: ."),
        Checkpointer(str(tmp_path)) as checkpointer,
    ):
        checkpointer.restore(like)


def test_checkpoints_of_other_models_and_optimizers_are_refused(tmp_path, like):
    _write(tmp_path, 1)
    kernel = like.params["kernel"].replace(value=jnp.zeros((_SIZE, 2)))
    others = {
        r"params.kernel is of shape \(256, 256\) in the checkpoint, .* \(256, 2\) in this .*": (
            like.replace(params=like.params | {"kernel": kernel})
        ),
        "params.bias is of shape .* in the checkpoint, missing in this configuration": (
            like.replace(params={"kernel": kernel})
        ),
        r"it has another optimizer: opt_state.0.\S* is .* in the checkpoint, missing in .*": (
            _create(optimizer=optax.sgd(1e-2, momentum=0.9))
        ),
    }
    with Checkpointer(str(tmp_path)) as checkpointer:
        for pattern, other in others.items():
            with pytest.raises(OSError) as caught:
                checkpointer.restore(other)
            message = f"the checkpoint of step 1 in {tmp_path} cannot be read: "
            assert str(caught.value).startswith(message)
            assert re.search(f": {pattern}$", str(caught.value))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be opened") as caught:
        Checkpointer(str(tmp_path / "file" / "checkpoints"))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_at_once_and_the_last_checkpoint_stays(tmp_path, like):
    arrays = _write(tmp_path, 1)
    checkpointer = Checkpointer(str(tmp_path), max_to_keep=1)
    with full_disk(100_000):
        checkpointer.save(2, _create())
        message = _wait_for_error(checkpointer)
    assert message == f"a checkpoint cannot be written to {tmp_path}: {os.strerror(errno.EFBIG)}"
    for call in (
        checkpointer.wait_until_finished,
        lambda: checkpointer.save(3, like),
        checkpointer.close,
    ):
        with pytest.raises(OSError, match="a checkpoint cannot be written"):
            call()
    assert checkpointer.latest_step() == 1
    reports = []
    assert _discard_unusable(tmp_path, reports.append) == 1
    assert reports == ["removed the checkpoint of step 2, which was not finished"]
    assert _steps(tmp_path) == {1}
    with Checkpointer(str(tmp_path)) as checkpointer:
        _assert_same(checkpointer.restore(like), arrays[1])


def test_a_checkpoint_without_checksums_does_not_count(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)

    _write(tmp_path, 1)
    monkeypatch.setattr(folder, "write_checksums", fail)
    checkpointer = Checkpointer(str(tmp_path), max_to_keep=1)
    checkpointer.save(2, _create())
    assert _wait_for_error(checkpointer).endswith("No space left on device")
    assert checkpointer.latest_step() == 1
    assert _discard_unusable(tmp_path, lambda text: None) == 1
    assert _steps(tmp_path) == {1}


def test_an_error_in_the_block_is_told_and_not_one_from_closing(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpointer(str(tmp_path / "a")) as checkpointer:
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("")
        with contextlib.suppress(OSError):
            checkpointer.save(1, _create())
        raise ZeroDivisionError


def test_a_checkpoint_holds_no_boxes(tmp_path):
    arrays = _write(tmp_path, 1)[1]
    assert unboxed(arrays.params)["kernel"].shape == (_SIZE, _SIZE)
    with open(tmp_path / "1" / "state" / "_METADATA", encoding="utf-8") as file:
        content = file.read()
    assert "params.kernel" in content
    assert "Partitioned" not in content and "value" not in json.loads(content)["tree_metadata"]
