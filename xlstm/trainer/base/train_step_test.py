"""Tests of the training step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def _loss_metrics(params, apply_fn, batch, keys, carried_state):
    noise = jax.vmap(jax.random.uniform)(keys)
    metrics = {
        "loss": _squares(params, batch),
        "noise": jnp.sum(noise * batch["weight"][:, 0]),
        "squared_noise": jnp.sum(noise**2),
    }
    return metrics, carried_state


def _batch():
    """Returns a regression problem with unevenly masked targets; some examples have none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(_BATCH_SIZE, _TIME, _SIZE)).astype(np.float32)
    y = x @ np.arange(1.0, _SIZE + 1, dtype=np.float32) + 0.5
    mask = rng.random((_BATCH_SIZE, _TIME)) < np.linspace(0, 1, _BATCH_SIZE)[:, None]
    weight = np.arange(1.0, _BATCH_SIZE + 1, dtype=np.float32)[:, None]
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
    eval_step = create_eval_step(
        mesh, specs.params, lambda params, batch, carried: (_squares(params, batch), carried)
    )
    found, _ = eval_step(state.params, _batch(), None)
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
