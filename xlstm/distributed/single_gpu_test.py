import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from xlstm.common_types import TrainState
from xlstm.distributed.single_gpu import (
    accumulate_gradients,
    accumulate_gradients_loop,
    accumulate_gradients_scan,
)

ACCUMULATORS = [
    accumulate_gradients_loop,
    accumulate_gradients_scan,
    accumulate_gradients,
    functools.partial(accumulate_gradients, use_scan=True),
]
each_accumulator = pytest.mark.parametrize("accumulate", ACCUMULATORS)

BATCH = 12


class Net(nn.Module):
    """A small network with boxed parameters."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(1.0), (None, "tp"))
        kernel = self.param("kernel", init, (3, 2), unbox=False)
        return jnp.tanh(x @ kernel.value)


@pytest.fixture(scope="module")
def state():
    net = Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    return TrainState.create(
        apply_fn=net.apply, params=params, tx=optax.sgd(1.0), rng=jax.random.key(1)
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 3)).astype(np.float32)
    y = rng.standard_normal((BATCH, 2)).astype(np.float32)
    return {"input": x, "targets": (y, np.arange(BATCH))}


def loss_fn(params, apply_fn, batch, rng):
    del rng
    targets, indices = batch["targets"]
    errors = jnp.sum((apply_fn({"params": params}, batch["input"]) - targets) ** 2, axis=-1)
    metrics = {"error": (jnp.sum(errors), jnp.float32(errors.size)), "indices": indices.sum()}
    return jnp.mean(errors), (metrics, {"stats": {"first": indices[0], "inputs": batch["input"]}})


@each_accumulator
@pytest.mark.parametrize("num_minibatches", [1, 4, BATCH])
def test_the_gradient_is_the_undivided_one(accumulate, num_minibatches, state, batch):
    expected, (metrics, _) = jax.grad(loss_fn, has_aux=True)(
        state.params, state.apply_fn, batch, state.rng
    )
    grads, summed, mutable = accumulate(state, batch, state.rng, num_minibatches, loss_fn)

    assert isinstance(grads["kernel"], nn.Partitioned)
    assert grads["kernel"].names == (None, "tp")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), grads, expected)

    assert jax.tree.structure(summed) == jax.tree.structure(metrics)
    np.testing.assert_allclose(summed["error"][0], metrics["error"][0], rtol=1e-5)
    assert summed["error"][1] == BATCH
    assert summed["indices"] == sum(range(BATCH))

    size = BATCH // num_minibatches
    np.testing.assert_array_equal(mutable["stats"]["first"], np.arange(0, BATCH, size))
    np.testing.assert_array_equal(
        mutable["stats"]["inputs"], batch["input"].reshape(num_minibatches, size, 3)
    )


@each_accumulator
def test_works_under_jit(accumulate, state, batch):
    compiled = jax.jit(lambda state, batch: accumulate(state, batch, state.rng, 3, loss_fn))
    actual, expected = compiled(state, batch), accumulate(state, batch, state.rng, 3, loss_fn)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), actual, expected)


@each_accumulator
def test_every_minibatch_has_a_key_of_its_own(accumulate, state, batch):
    def noisy_loss(params, apply_fn, batch, rng):
        noise = jax.random.normal(rng)
        return noise * jnp.sum(params["kernel"].value), ({"noise": noise}, {"noise": noise})

    def noise_of(seed):
        return accumulate(state, batch, jax.random.key(seed), 4, noisy_loss)

    grads, metrics, mutable = noise_of(5)
    assert len(np.unique(mutable["noise"])) == 4
    np.testing.assert_allclose(metrics["noise"], mutable["noise"].sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["kernel"].value, mutable["noise"].mean(), rtol=1e-5)
    np.testing.assert_array_equal(noise_of(5)[2]["noise"], mutable["noise"])
    assert not np.any(noise_of(6)[2]["noise"] == mutable["noise"])


@each_accumulator
def test_no_mutable_variables(accumulate, state, batch):
    def loss(*arguments):
        value, (metrics, _) = loss_fn(*arguments)
        return value, (metrics, None)

    assert accumulate(state, batch, state.rng, 2, loss)[2] is None


def test_scan_compiles_one_minibatch_whatever_their_number(state, batch):
    def traces(accumulate):
        calls = []

        def counting(*arguments):
            calls.append(1)
            return loss_fn(*arguments)

        jax.make_jaxpr(lambda batch: accumulate(state, batch, state.rng, 6, counting))(batch)
        return len(calls)

    assert traces(accumulate_gradients_loop) == 6
    assert traces(accumulate_gradients_scan) < 6


@each_accumulator
def test_no_example_is_dropped(accumulate, state, batch):
    with pytest.raises(ValueError, match="12 examples does not divide into 5 minibatches"):
        accumulate(state, batch, state.rng, 5, loss_fn)


@each_accumulator
@pytest.mark.parametrize("num_minibatches", [0, -1])
def test_number_of_minibatches(accumulate, num_minibatches, state, batch):
    with pytest.raises(ValueError, match=f"num_minibatches={num_minibatches}.*at least 1"):
        accumulate(state, batch, state.rng, num_minibatches, loss_fn)


@each_accumulator
@pytest.mark.parametrize("leaf", [np.zeros(6), np.float32(0)])
def test_leaves_that_disagree_on_the_examples(accumulate, leaf, state, batch):
    with pytest.raises(ValueError, match="must agree on their leading axis"):
        accumulate(state, {**batch, "more": leaf}, state.rng, 2, loss_fn)


@each_accumulator
@pytest.mark.parametrize("check_vma", [True, False])
def test_works_under_shard_map(accumulate, check_vma, state, batch):
    mesh = jax.make_mesh((2,), ("dp",), (jax.sharding.AxisType.Auto,))

    def step(params, batch):
        # Parameters are marked as varying, so that gradients are summed once, at the end.
        params = jax.lax.pcast(params, "dp", to="varying") if check_vma else params
        grads, metrics, _ = accumulate(state.replace(params=params), batch, state.rng, 3, loss_fn)
        return jax.lax.pmean(grads, "dp"), jax.lax.psum(metrics, "dp")

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P(), check_vma=check_vma
    )
    grads, metrics = jax.jit(sharded)(state.params, batch)
    expected, (expected_metrics, _) = jax.grad(loss_fn, has_aux=True)(
        state.params, state.apply_fn, batch, state.rng
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), grads, expected)
    np.testing.assert_allclose(metrics["error"], expected_metrics["error"], rtol=1e-5)
