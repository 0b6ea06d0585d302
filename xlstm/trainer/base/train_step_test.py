"""Tests of the training step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import TrainState
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.multihost import Request, Requests
from xlstm.trainer.base.param_utils import is_partitioned, unboxed
from xlstm.trainer.base.train_state import create_train_state
from xlstm.trainer.base.train_step import (
    BATCH_SPEC,
    create_eval_step,
    create_train_step,
)
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


_BATCH_SIZE, _TIME, _SIZE = 16, 3, 4


class _Model(nn.Module):
    """A boxed kernel and a plain bias."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(0.5), (None, "tp"))
        kernel = self.param("kernel", init, (_SIZE, 1), unbox=False).value
        return (x @ kernel)[..., 0] + self.param("bias", nn.initializers.zeros, ())


_MODEL = _Model()


def _squares(params, batch):
    """Returns the sum of the unmasked squared errors, and their number."""
    errors = jnp.square(_MODEL.apply({"params": params}, batch["x"]) - batch["y"])
    return jnp.sum(errors * batch["mask"]), jnp.sum(batch["mask"])


def _loss_metrics(params, apply_fn, batch, keys):
    noise = jax.vmap(jax.random.uniform)(keys)
    return {
        "loss": _squares(params, batch),
        "noise": jnp.sum(noise * batch["weight"]),
        "squared_noise": jnp.sum(noise**2),
    }


def _batch():
    """Returns a regression problem with unevenly masked targets; some examples have none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(_BATCH_SIZE, _TIME, _SIZE)).astype(np.float32)
    y = x @ np.arange(1.0, _SIZE + 1, dtype=np.float32) + 0.5
    mask = rng.random((_BATCH_SIZE, _TIME)) < np.linspace(0, 1, _BATCH_SIZE)[:, None]
    weight = np.arange(1.0, _BATCH_SIZE + 1, dtype=np.float32)
    return {"x": x, "y": y, "mask": mask.astype(np.float32), "weight": weight}


@functools.cache
def _compiled(num_minibatches=1, optimizer=None, num_devices=8, norms_per_param=False, **sizes):
    mesh = create_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])
    state, specs = create_train_state(
        init_params=lambda rng: _MODEL.init(rng, jnp.zeros((1, _SIZE)))["params"],
        apply_fn=_MODEL.apply,
        optimizer=optimizer or optax.identity(),
        rng=jax.random.PRNGKey(0),
        mesh=mesh,
    )
    train_step = create_train_step(
        mesh,
        specs,
        _loss_metrics,
        count_targets=lambda batch: jnp.sum(batch["mask"]),
        update=functools.partial(
            update_state,
            schedule=lambda step: 0.1 / (step + 1),
            grad_clip_norm=1e9,
            max_grad_norm_ratio=0.0,
            ema_decay=0.0,
        ),
        num_minibatches=num_minibatches,
        norms_per_param=norms_per_param,
    )
    return mesh, state, specs, train_step


def _setup(**kwargs):
    """Returns the mesh, a copy of the state, the specs and the step."""
    mesh, state, specs, train_step = _compiled(**kwargs)
    return mesh, jax.tree.map(jnp.copy, state), specs, train_step


def _one_step(**kwargs):
    _, state, _, train_step = _setup(**kwargs)
    state, metrics = train_step(state, _batch())
    return jax.device_get(unboxed(state.params)), jax.device_get(metrics)


@pytest.fixture(scope="module")
def undivided():
    return _one_step(num_devices=1)


def _assert_same(found, expected):
    params, metrics = found
    expected_params, expected_metrics = expected
    for name, value in expected_params.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6)
    for name in ("loss", "grad_norm", "param_norm", "lr"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)


def test_the_step_is_that_of_the_whole_batch(undivided):
    _, state, *_ = _setup(num_devices=1)
    params, batch = state.params, _batch()

    def mean_square(params):
        total, count = _squares(params, batch)
        return total / count

    loss, grads = jax.value_and_grad(mean_square)(params)
    grads, params = unboxed(grads), unboxed(params)
    found, metrics = undivided
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(new, old - 0.1 * grad, rtol=1e-5),
        found,
        params,
        grads,
    )
    total, count = metrics["loss"]
    np.testing.assert_allclose(total / count, loss, rtol=1e-6)
    assert count == batch["mask"].sum()
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(params), rtol=1e-5)
    np.testing.assert_allclose(metrics["lr"], 0.1)


@pytest.mark.parametrize("sizes", [{"dp": 8}, {"dp": 2, "fsdp": 4}], ids=str)
def test_data_parallelism_changes_nothing(undivided, sizes):
    _assert_same(_one_step(**sizes), undivided)


@pytest.mark.parametrize(
    "num_minibatches, sizes",
    [(2, {"num_devices": 1}), (4, {"num_devices": 1}), (4, {"num_devices": 4, "dp": 4})],
    ids=str,
)
def test_accumulation_changes_nothing(undivided, num_minibatches, sizes):
    _assert_same(_one_step(num_minibatches=num_minibatches, **sizes), undivided)


def test_a_batch_without_targets_changes_nothing():
    _, state, _, train_step = _setup(dp=8)
    before = jax.device_get(unboxed(state.params))
    batch = _batch() | {"mask": np.zeros((_BATCH_SIZE, _TIME), np.float32)}
    state, _ = train_step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(unboxed(state.params)), before)


def test_the_loss_falls_and_steps_are_counted():
    constant = optax.scale_by_schedule(lambda step: step + 1)  # Makes the learning rate constant.
    optimizer = optax.chain(optax.scale_by_adam(), constant)
    mesh, state, _, train_step = _setup(optimizer=optimizer)
    batch = jax.device_put(_batch(), NamedSharding(mesh, BATCH_SPEC))
    losses, rates = [], []
    for _ in range(60):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        rates.append(float(metrics["lr"]))
    assert losses[-1] < 0.1 * losses[0]
    assert int(state.step) == 60
    np.testing.assert_allclose(rates[:3], [0.1, 0.05, 0.1 / 3], rtol=1e-6)


def test_the_state_keeps_its_form():
    _, state, specs, train_step = _setup(optimizer=optax.scale_by_adam(), num_devices=4)
    before = jax.tree.structure(state), jax.tree.map(lambda x: (x.shape, x.dtype), state)
    rng = jax.device_get(state.rng)
    state, _ = train_step(state, _batch())
    after = jax.tree.structure(state), jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert after == before
    assert is_partitioned(state.params["kernel"])
    assert state.params["kernel"].names == (None, "tp")
    assert specs.params["kernel"] == specs.opt_state.mu["kernel"] == P(None, "tp")
    np.testing.assert_array_equal(state.rng, rng)


def test_the_state_is_consumed():
    _, state, _, train_step = _setup(num_devices=1)
    train_step(state, _batch())
    assert state.params["kernel"].value.is_deleted()


def _noise(num_steps, **kwargs):
    _, state, _, train_step = _setup(**kwargs)
    rows = []
    for _ in range(num_steps):
        state, metrics = train_step(state, _batch())
        rows.append([float(metrics["noise"]), float(metrics["squared_noise"])])
    return np.array(rows)


def test_every_example_and_step_has_random_numbers_of_its_own():
    (sum_, squares), (next_sum, _) = _noise(2, num_devices=1)
    # Equal numbers would have a weighted mean whose square is the mean of the squares; those of
    # [0, 1) have a variance of about 1 / 12.
    weights = sum(range(1, _BATCH_SIZE + 1))
    assert squares / _BATCH_SIZE - (sum_ / weights) ** 2 > 0.02
    assert sum_ != next_sum


@pytest.mark.parametrize(
    "sizes",
    [{"dp": 8}, {"dp": 2, "fsdp": 4}, {"num_minibatches": 2, "num_devices": 1}],
    ids=str,
)
def test_random_numbers_do_not_depend_on_the_mesh(sizes):
    np.testing.assert_allclose(_noise(2, **sizes), _noise(2, num_devices=1), rtol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_evaluation_sums_over_the_whole_batch(num_devices):
    mesh, state, specs, _ = _setup(num_devices=num_devices)
    eval_step = create_eval_step(mesh, specs.params, _squares)
    found = eval_step(state.params, _batch())
    np.testing.assert_allclose(found, _squares(state.params, _batch()), rtol=1e-5)
    assert not state.params["kernel"].value.is_deleted()


def test_a_request_of_any_process_is_a_metric():
    mesh, state, _, train_step = _setup()
    requests, found = Requests(mesh), []
    for asked in ([], [Request.CHECKPOINT], [Request.STOP, Request.CHECKPOINT], []):
        for request in asked:
            requests.ask(request)
        state, metrics = train_step(state, _batch(), requests.current())
        found.append(Request(int(metrics["request"])))
        requests.answered(found[-1])
    assert found == [Request.NONE, Request.CHECKPOINT, Request.STOP, Request.NONE]


def test_one_device_speaks_for_all():
    mesh, state, _, train_step = _setup()
    asked = np.zeros(8, np.int32)
    asked[5] = Request.CHECKPOINT
    asked = jax.device_put(asked, NamedSharding(mesh, P(mesh.axis_names)))
    _, metrics = train_step(state, _batch(), asked)
    assert metrics["request"] == Request.CHECKPOINT


def test_norms_of_single_parameters_are_metrics_if_asked_for():
    _, metrics = _one_step(norms_per_param=True)
    norms = [metrics["param_norm_kernel"], metrics["param_norm_bias"]]
    np.testing.assert_allclose(np.linalg.norm(norms), metrics["param_norm"], rtol=1e-6)
    assert {"grad_norm_kernel", "grad_norm_bias"} <= metrics.keys()
