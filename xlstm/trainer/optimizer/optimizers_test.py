import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.optimizer.optimizers import (
    OptimizerConfig,
    clip_by_sharded_global_norm,
    create_optimizer,
)


def _params():
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings": {"embedding": (8, 4)},
        "blocks": {
            "norm_mlstm": {"scale": (4,)},
            "igate_preact": {"kernel": (4, 2), "bias": (2,)},
            "multihead_norm": {"scale": (4,)},
        },
        "lm_head": {"kernel": (4, 8)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _one_update(config, params, grads, learning_rate=0.1):
    optimizer = create_optimizer(config, lambda step: learning_rate)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


def _assert_close(found, expected, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), found, expected)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_that_of_optax_on_one_device(max_norm):
    grads, empty = _params(), optax.EmptyState()
    found, _ = clip_by_sharded_global_norm(max_norm).update(grads, empty)
    expected, _ = optax.clip_by_global_norm(max_norm).update(grads, empty)
    _assert_close(found, expected)


def test_clipping_of_zeros_is_zero():
    zeros = jax.tree.map(jnp.zeros_like, _params())
    found, _ = clip_by_sharded_global_norm(1.0).update(zeros, optax.EmptyState())
    _assert_close(found, zeros)


def test_clipping_keeps_the_type():
    grads = {"a": jnp.full(3, 10.0, jnp.bfloat16)}
    found, _ = clip_by_sharded_global_norm(1.0).update(grads, optax.EmptyState())
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["a"].astype(jnp.float32), 3**-0.5, rtol=1e-2)


def test_clipping_counts_the_shards_of_all_devices():
    grads = {
        "cut": nn.Partitioned(jnp.arange(32.0).reshape(4, 8), ("fsdp", "tp")),
        "whole": nn.Partitioned(jnp.full(4, 5.0), (None,)),
        "plain": jnp.full(3, 7.0),
    }
    specs = nn.get_partition_spec(grads)
    clip = jax.shard_map(
        lambda grads: clip_by_sharded_global_norm(2.0).update(grads, optax.EmptyState())[0],
        mesh=create_mesh(MeshConfig(dp=1, fsdp=2, tp=4)),
        in_specs=(specs,),
        out_specs=specs,
        check_vma=False,
    )
    found = jax.jit(clip)(grads)
    expected, _ = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())
    assert jax.tree.structure(found) == jax.tree.structure(grads)
    _assert_close(found, expected)
    np.testing.assert_allclose(optax.tree.norm(found), 2.0, rtol=1e-6)
    assert found["cut"].names == ("fsdp", "tp")
    assert specs["plain"] == P()


def test_decay_leaves_biases_norms_and_embeddings_alone():
    params = _params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = _one_update(OptimizerConfig(weight_decay=0.5), params, zeros)
    expected = jax.tree.map(jnp.zeros_like, params)
    expected["lm_head"]["kernel"] = -0.1 * 0.5 * params["lm_head"]["kernel"]
    gate = params["blocks"]["igate_preact"]["kernel"]
    expected["blocks"]["igate_preact"]["kernel"] = -0.1 * 0.5 * gate
    _assert_close(updates, expected)


def test_what_is_decayed_can_be_chosen():
    params = _params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = _one_update(OptimizerConfig(weight_decay_exclude=()), params, zeros)
    _assert_close(updates, jax.tree.map(lambda x: -0.1 * 0.1 * x, params))


def test_boxes_change_nothing():
    params = _params()
    grads = jax.tree.map(jnp.sin, params)
    boxed = [
        jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree)
        for tree in (params, grads)
    ]
    found = _one_update(OptimizerConfig(), *boxed)
    assert jax.tree.structure(found) == jax.tree.structure(boxed[0])
    _assert_close(nn.meta.unbox(found), _one_update(OptimizerConfig(), params, grads))


def test_the_first_step_follows_the_paper():
    params, learning_rate = {"kernel": jnp.array([1.0, -2.0])}, 0.01
    grads = {"kernel": jnp.array([0.3, -0.4])}  # Of norm 0.5: clipped to 0.25.
    config = OptimizerConfig(eps=1e-3, weight_decay=0.1, grad_clip_norm=0.25)
    found = _one_update(config, params, grads, learning_rate)
    g, p = np.array([0.15, -0.2]), np.array([1.0, -2.0])
    # With the bias corrected the first moments are those of one gradient.
    np.testing.assert_allclose(
        found["kernel"], -learning_rate * (g / (np.abs(g) + 1e-3) + 0.1 * p), rtol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"grad_clip_norm": 0.0},
        {"grad_clip_norm": -1.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"weight_decay_exclude": ("(",)},
    ],
    ids=str,
)
def test_bad_options(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=rf"optimizer\.{name}"):
        OptimizerConfig(**options)
