"""Tests of the update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import TrainState
from xlstm.trainer.base.update import update_state

_PARAMS = {"kernel": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), "bias": np.ones(8)}


def _schedule(step):
    return 0.1 / (step + 1.0)


def _state(optimizer=None, with_ema=False, place=jnp.asarray):
    params = jax.tree.map(lambda x: place(np.float32(x)), _PARAMS)
    optimizer = optimizer or optax.scale_by_adam()
    return TrainState(
        step=jnp.int32(0),
        apply_fn=None,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
        rng=jax.random.PRNGKey(0),
        params_ema=params if with_ema else None,
        grad_norm_mean=jnp.float32(0),
        skipped_steps=jnp.int32(0),
    )


def _grads(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.normal(size=x.shape)) for name, x in _PARAMS.items()}


@functools.partial(jax.jit, static_argnames=("clip", "ratio", "decay"))
def _update(state, grads, clip=1e9, ratio=0.0, decay=0.0, loss=1.0):
    return update_state(
        state,
        grads,
        optax.tree.norm(grads),
        jnp.float32(loss),
        optax.tree.norm,
        schedule=_schedule,
        grad_clip_norm=clip,
        max_grad_norm_ratio=ratio,
        ema_decay=decay,
    )


@pytest.mark.parametrize("optimizer", [optax.identity(), optax.scale_by_adam()])
def test_the_norm_of_the_update_is_that_of_the_change(optimizer):
    state = _state(optimizer)
    after, metrics = _update(state, _grads())
    change = jax.tree.map(lambda x, y: np.asarray(x) - y, after.params, _PARAMS)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(change), rtol=1e-5)
    _, metrics = _update(state, _grads(), loss=np.nan)
    assert metrics["update_norm"] == 0 and metrics["skipped"] == 1


def test_the_learning_rate_scales_the_direction():
    state, metrics = _update(_state(optax.identity()), _grads())
    for name, value in _PARAMS.items():
        np.testing.assert_allclose(state.params[name], value - 0.1 * _grads()[name], rtol=1e-6)
    assert metrics["lr"] == np.float32(0.1) and metrics["skipped"] == 0
    assert state.step == 1


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_clipping_is_that_of_the_global_norm(clip):
    state, _ = _update(_state(optax.identity()), _grads(), clip=clip)
    expected, _ = optax.clip_by_global_norm(clip).update(_grads(), optax.EmptyState())
    for name, value in _PARAMS.items():
        np.testing.assert_allclose(state.params[name], value - 0.1 * expected[name], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(bad):
    before, _ = _update(_state(with_ema=True), _grads(), decay=0.9)
    grads = _grads(seed=1)
    grads["kernel"][3, 1] = bad
    after, metrics = _update(before, grads, decay=0.9)
    for field in ("params", "opt_state", "params_ema", "grad_norm_mean"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(before, field))
    assert after.step == 2 and after.skipped_steps == 1
    assert metrics["skipped"] == metrics["skipped_steps"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_so_does_a_loss_that_is_not_finite(bad):
    before = _state()
    after, metrics = _update(before, _grads(), loss=bad)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert metrics["skipped"] == 1


def test_the_learning_rate_is_that_of_the_step_after_skipped_ones_too():
    state, rates = _state(), []
    for scale in (1, np.nan, np.nan, 1):
        state, metrics = _update(state, _grads(scale))
        rates.append(float(metrics["lr"]))
    np.testing.assert_allclose(rates, [_schedule(step) for step in range(4)], rtol=1e-6)
    assert state.skipped_steps == 2


def test_outliers_are_skipped_until_they_are_the_rule():
    state = _state()
    for seed in range(5):
        state, metrics = _update(state, _grads(seed=seed), ratio=4.0)
        assert metrics["skipped"] == 0
    before = state
    state, metrics = _update(state, _grads(100), ratio=4.0)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    state, metrics = _update(state, _grads(), ratio=4.0)
    assert metrics["skipped"] == 0

    num_skipped = 0
    for _ in range(200):
        state, metrics = _update(state, _grads(100), ratio=4.0)
        num_skipped += int(metrics["skipped"])
    assert 10 < num_skipped < 100
    assert metrics["skipped"] == 0


def test_without_a_ratio_no_outlier_is_skipped():
    state, _ = _update(_state(), _grads())
    _, metrics = _update(state, _grads(1e6))
    assert metrics["skipped"] == 0


def test_the_average_follows_the_parameters():
    state, average = _state(with_ema=True), {name: np.float64(x) for name, x in _PARAMS.items()}
    # The first averages cover few steps.
    for seed, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        state, _ = _update(state, _grads(seed=seed), decay=0.3)
        for name in average:
            now = np.asarray(state.params[name], np.float64)
            average[name] = decay * average[name] + (1 - decay) * now
            np.testing.assert_allclose(state.params_ema[name], average[name], rtol=1e-5, atol=1e-7)


def test_a_mesh_changes_nothing():
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))

    def cut(array):
        return jax.device_put(array, NamedSharding(mesh, P("x")))

    found, expected = _state(place=cut), _state()
    for seed in range(3):
        grads = _grads(seed=seed)
        found, _ = _update(found, jax.tree.map(cut, grads), clip=0.5)
        expected, _ = _update(expected, grads, clip=0.5)
    for name in _PARAMS:
        np.testing.assert_allclose(found.params[name], expected.params[name], rtol=1e-6, atol=1e-7)
        assert not found.params[name].sharding.is_fully_replicated
