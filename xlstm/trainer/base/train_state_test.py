import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.param_utils import is_partitioned, unboxed
from xlstm.trainer.base.train_state import create_train_state
from xlstm.trainer.optimizer.optimizers import OptimizerConfig, create_optimizer


class _Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        def parameter(name, init, shape, names):
            return self.param(name, nn.with_partitioning(init, names), shape, unbox=False).value

        init = nn.initializers.normal(1.0)
        x = x @ parameter("up", init, (8, 16), (None, "tp"))
        x = x @ parameter("down", init, (16, 8), ("tp", "fsdp"))
        return x * parameter("scale", nn.initializers.ones, (8,), (None,))


_MODEL = _Model()
_OPTIMIZER = create_optimizer(OptimizerConfig(), lambda step: 1e-3)


@functools.lru_cache
def _create(seed=0, **sizes):
    """The state and its specs on 8 devices, or, without sizes, on one."""
    return create_train_state(
        init_params=lambda rng: _MODEL.init(rng, jnp.zeros((1, 8)))["params"],
        apply_fn=_MODEL.apply,
        optimizer=_OPTIMIZER,
        rng=jax.random.PRNGKey(seed),
        mesh=create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1]),
    )


@pytest.mark.parametrize(
    "sizes",
    [{"dp": 8}, {"dp": 1, "fsdp": 8}, {"tp": 8}, {"dp": 2, "fsdp": 2, "tp": 2}, {"pp": 4, "tp": 2}],
    ids=str,
)
def test_every_mesh_begins_with_the_same_values(sizes):
    expected, _ = jax.device_get(unboxed(_create()))
    found, _ = jax.device_get(unboxed(_create(**sizes)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_leaves_lie_where_their_specs_say():
    state, specs = _create(dp=2, fsdp=2, tp=2)
    assert specs.params == {"up": P(None, "tp"), "down": P("tp", "fsdp"), "scale": P(None)}
    assert unboxed(state.params)["up"].sharding.shard_shape((8, 16)) == (8, 8)
    assert unboxed(state.params)["down"].sharding.shard_shape((16, 8)) == (8, 4)
    assert unboxed(state.params)["scale"].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated


def test_the_moments_are_cut_and_boxed_as_the_parameters_are():
    state, specs = _create(dp=2, fsdp=2, tp=2)
    like_params = jax.tree.structure(state.params)
    paths = jax.tree_util.tree_leaves_with_path(specs.opt_state)
    moments = [spec for path, spec in paths if "up" in jax.tree_util.keystr(path)]
    assert moments == [P(None, "tp")] * 2  # The mean and the mean of the squares.
    subtrees = jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: jax.tree.structure(x) == like_params
    )
    moments = [tree for tree in subtrees if isinstance(tree, dict)]
    assert len(moments) == 2
    for tree in moments:
        assert all(is_partitioned(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_partitioned))
        assert tree["down"].value.sharding.shard_shape((16, 8)) == (8, 4)


def test_the_state_begins_at_step_zero_with_a_key_of_its_own():
    state, _ = _create()
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert not np.array_equal(state.rng, jax.random.PRNGKey(0))


def test_seeds_differ():
    one, other = _create()[0], _create(seed=1)[0]
    assert not np.array_equal(one.params["up"].value, other.params["up"].value)
    assert not np.array_equal(one.rng, other.rng)
