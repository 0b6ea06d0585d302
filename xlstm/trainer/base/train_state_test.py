import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
_OPTIMIZER = create_optimizer(OptimizerConfig(weight_decay_exclude=("scale",)))


@functools.lru_cache
def _create(optimizer=_OPTIMIZER, seed=0, with_ema=False, **sizes):
    """Returns the state and its specs on 8 devices or, without sizes, on one."""
    return create_train_state(
        init_params=lambda rng: _MODEL.init(rng, jnp.zeros((1, 8)))["params"],
        apply_fn=_MODEL.apply,
        optimizer=optimizer,
        rng=jax.random.PRNGKey(seed),
        mesh=create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1]),
        with_ema=with_ema,
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


def test_the_moments_are_cut_as_the_parameters_are():
    state, specs = _create(dp=2, fsdp=2, tp=2)
    paths = jax.tree_util.tree_leaves_with_path(specs.opt_state)
    moments = [spec for path, spec in paths if "up" in jax.tree_util.keystr(path)]
    assert moments == [P(None, "tp")] * 2  # The first and the second moment.
    like_params = jax.tree.structure(unboxed(state.params))
    subtrees = jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: jax.tree.structure(x) == like_params
    )
    moments = [tree for tree in subtrees if isinstance(tree, dict)]
    assert len(moments) == 2
    for tree in moments:
        assert not any(map(is_partitioned, tree.values()))  # An optimizer gets plain arrays.
        assert tree["down"].sharding.shard_shape((16, 8)) == (8, 4)


def test_what_an_optimizer_has_in_other_shapes_is_whole():
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    state, specs = _create(optimizer, dp=2, fsdp=2, tp=2)
    assert state.opt_state.v_row["down"].shape == (8,)
    assert specs.opt_state.v_row["down"] == specs.opt_state.v_col["up"] == P()
    assert state.opt_state.v["scale"].shape == (8,)  # Too small to be factored.
    assert specs.opt_state.v["scale"] == P(None)


def test_the_average_of_the_parameters_begins_as_they_do():
    state, specs = _create(with_ema=True, dp=2, fsdp=2, tp=2)
    assert specs.params_ema == specs.params
    jax.tree.map(np.testing.assert_array_equal, state.params_ema, state.params)
    pointers = [
        tree["up"].value.addressable_shards[0].data.unsafe_buffer_pointer()
        for tree in (state.params, state.params_ema)
    ]
    assert pointers[0] != pointers[1]  # A step donates both.
    assert _create()[0].params_ema is None


def test_the_state_begins_at_step_zero_with_a_key_of_its_own():
    state, _ = _create()
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert state.skipped_steps == 0 and state.grad_norm_mean == 0
    assert not np.array_equal(state.rng, jax.random.PRNGKey(0))


def test_seeds_differ():
    one, other = _create()[0], _create(seed=1)[0]
    assert not np.array_equal(one.params["up"].value, other.params["up"].value)
    assert not np.array_equal(one.rng, other.rng)
