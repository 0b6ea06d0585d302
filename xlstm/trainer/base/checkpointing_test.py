import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.checkpointing import Checkpointer
from xlstm.trainer.base.param_utils import is_partitioned, unboxed
from xlstm.trainer.base.train_state import create_train_state

_SIZE = 512


class _Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(1.0), (None, "tp"))
        kernel = self.param("kernel", init, (_SIZE, _SIZE), unbox=False).value
        return x @ kernel + self.param("bias", nn.initializers.zeros, (_SIZE,))


_MODEL = _Model()
_OPTIMIZER = optax.adamw(1e-2)


def _create(seed=0, **sizes):
    return create_train_state(
        init_params=lambda rng: _MODEL.init(rng, jnp.zeros((1, _SIZE)))["params"],
        apply_fn=_MODEL.apply,
        optimizer=_OPTIMIZER,
        rng=jax.random.PRNGKey(seed),
        mesh=create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1]),
    )[0]


def _step(state):
    grads = jax.tree.map(lambda x: 1e-2 * x + 1, state.params)
    return state.apply_gradients(grads=grads)


# Donation lets a step write over the arrays of the state before it, as in training.
_donating_step = jax.jit(_step, donate_argnums=0)


def _arrays(state):
    """Copies of a state's arrays, with the boxes' names."""
    return jax.tree.map(np.array, jax.device_get(state))


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    found, expected = _arrays(found), _arrays(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)


def _write(directory, *steps, max_to_keep=2):
    """Writes checkpoints of a short training; returns the arrays at each."""
    checkpointer = Checkpointer(str(directory), max_to_keep)
    state, arrays = _create(), {}
    for step in range(1, max(steps) + 1):
        state = _donating_step(state)
        if step in steps:
            arrays[step] = _arrays(state)
            checkpointer.save(step, state)
    checkpointer.close()
    return arrays


def _biggest_file(directory):
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return max(paths, key=os.path.getsize)


@pytest.fixture
def like():
    return _create(seed=1)


def test_everything_comes_back_bit_by_bit(tmp_path, like):
    arrays = _write(tmp_path / "checkpoints", 3)
    checkpointer = Checkpointer(str(tmp_path / "checkpoints"), 2)
    assert checkpointer.latest_step() == 3
    rng = np.array(like.rng)  # `restore` consumes what it is given.
    found = checkpointer.restore(like)
    checkpointer.close()
    _assert_same(found, arrays[3])
    assert int(found.step) == 3
    assert np.any(rng != found.rng)
    assert is_partitioned(found.opt_state[0].mu["kernel"])
    # The steps after are those that an unbroken run would have done.
    _assert_same(_donating_step(found), jax.jit(_step)(arrays[3]))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, like):
    checkpointer = Checkpointer(str(tmp_path), 2)
    state = _donating_step(_create())
    arrays = jax.tree.map(jnp.copy, state)  # A view on the host would keep the arrays alive.
    checkpointer.save(1, state)
    for _ in range(20):
        before, state = state, _donating_step(state)
    assert before.params["kernel"].value.is_deleted()
    checkpointer.close()
    checkpointer = Checkpointer(str(tmp_path), 2)
    _assert_same(checkpointer.restore(like), arrays)
    checkpointer.close()


def test_any_mesh_reads_what_another_wrote(tmp_path):
    arrays = _write(tmp_path, 1)
    other = _create(seed=1, dp=2, tp=4)
    checkpointer = Checkpointer(str(tmp_path), 2)
    found = checkpointer.restore(other)
    checkpointer.close()
    _assert_same(found, arrays[1])
    kernel = found.params["kernel"].value
    assert kernel.sharding.shard_shape(kernel.shape) == (_SIZE, _SIZE // 4)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, other)


def test_only_the_last_ones_are_kept(tmp_path, like):
    arrays = _write(tmp_path, 1, 2, 3, 4)
    assert {name for name in os.listdir(tmp_path) if name.isdigit()} == {"3", "4"}
    checkpointer = Checkpointer(str(tmp_path), 2)
    assert checkpointer.latest_step() == 4
    _assert_same(checkpointer.restore(like), arrays[4])
    checkpointer.close()


def test_without_checkpoints(tmp_path, like):
    checkpointer = Checkpointer(str(tmp_path / "none"), 1)
    assert checkpointer.latest_step() is None
    with pytest.raises(OSError, match="there is no checkpoint in .*none"):
        checkpointer.restore(like)
    checkpointer.close()


def test_what_a_killed_run_left_unfinished_does_not_count(tmp_path):
    _write(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "default").mkdir()
    checkpointer = Checkpointer(str(tmp_path), 2)
    assert checkpointer.latest_step() == 1
    checkpointer.close()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing"])
def test_a_damaged_checkpoint_is_an_error_in_one_sentence(tmp_path, like, damage):
    _write(tmp_path, 1)
    path = _biggest_file(tmp_path)
    if damage == "missing":
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2 if damage == "truncated" else 0)
    checkpointer = Checkpointer(str(tmp_path), 2)
    with pytest.raises(OSError, match=f"the checkpoint of step 1 in {tmp_path} cannot be read: ."):
        checkpointer.restore(like)
    checkpointer.close()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, like):
    _write(tmp_path, 1)
    kernel = like.params["kernel"].replace(value=jnp.zeros((_SIZE, 2)))
    checkpointer = Checkpointer(str(tmp_path), 2)
    with pytest.raises(OSError, match="the checkpoint of step 1") as caught:
        checkpointer.restore(like.replace(params=like.params | {"kernel": kernel}))
    assert "\n" not in str(caught.value)
    checkpointer.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be opened") as caught:
        Checkpointer(str(tmp_path / "file" / "checkpoints"), 1)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_holds_no_boxes(tmp_path):
    arrays = _write(tmp_path, 1)[1]
    assert unboxed(arrays.params)["kernel"].shape == (_SIZE, _SIZE)
    names = {name for _, folders, files in os.walk(tmp_path) for name in (*folders, *files)}
    assert not [name for name in names if "Partitioned" in name]
