import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import match_varying_axes
from xlstm.distributed.pipeline_parallel import (
    PipelineModule,
    bubble_fraction,
    execute_pipeline,
    execute_pipeline_step,
)

STAGES, BATCH, DIM = 4, 24, 3
with_and_without_check = pytest.mark.parametrize("check_vma", [True, False])


def assert_close(actual, expected):
    """Asserts equality up to rounding, relative to the largest element."""
    atol = 1e-5 * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def on_stages(fn, check_vma=True, num_stages=STAGES):
    """Returns the function on all stages, with a sharded first argument and stacked outputs."""
    mesh = jax.make_mesh(
        (num_stages,), ("pp",), (AxisType.Auto,), devices=jax.devices()[:num_stages]
    )

    def local(own, *args):
        results = fn(jax.tree.map(lambda leaf: leaf[0], own), *args)
        return jax.tree.map(lambda leaf: leaf[None], results)

    @jax.jit
    def run(own, *args):
        in_specs = (P("pp"), *(P() for _ in args))
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=P("pp"), check_vma=check_vma
        )
        return sharded(own, *args)

    return run


def of_stage(tree, stage):
    return jax.tree.map(lambda leaf: leaf[stage], tree)


def init_stages(stage, x, num_stages=STAGES):
    """Returns stacked variables of differently initialized stages, named as in `PipelineModule`."""
    keys = jax.random.split(jax.random.key(0), num_stages)
    variables = jax.jit(jax.vmap(lambda key: stage().init(key, x)))(keys)
    return {name: {"stage": tree} for name, tree in variables.items()}


def pipeline(stage, num_microbatches):
    return PipelineModule("pp", num_microbatches, functools.partial(stage, name="stage"))


@pytest.fixture(scope="module")
def x():
    return jnp.array(np.random.default_rng(1).standard_normal((BATCH, DIM)), jnp.float32)


@pytest.fixture(scope="module")
def variables(x):
    return init_stages(Stage, x)


class Stage(nn.Module):
    """A stage that treats examples separately, with options as extra arguments."""

    @nn.compact
    def __call__(self, x, scale=1.0, *, shift=0.0):
        return jnp.tanh(nn.Dense(x.shape[-1])(x) * scale) + shift


@functools.partial(jax.jit, static_argnames="num_stages")
def one_after_the_other(variables, x, *args, num_stages=STAGES, **kwargs):
    for stage in range(num_stages):
        params = of_stage(variables["params"]["stage"], stage)
        x = Stage().apply({"params": params}, x, *args, **kwargs)
    return x


@jax.jit
def grads_in_a_row(variables, x, scale):
    def loss(variables, x, scale):
        outputs = one_after_the_other(variables, x, scale, shift=0.5)
        return jnp.sum(outputs**2), outputs

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, x, scale)


@pytest.mark.parametrize(
    ("num_microbatches", "check_vma"),
    [(1, True), (2, False), (STAGES, True), (12, True), (12, False)],
)
def test_output_and_gradients_are_those_of_the_stages_in_a_row(
    num_microbatches, check_vma, variables, x
):
    scale = jnp.linspace(0.5, 2.0, DIM)

    def local(variables, x, scale):
        def loss(variables, x, scale):
            module = pipeline(Stage, num_microbatches)
            outputs = module.apply(variables, x, scale, shift=0.5)
            return jnp.sum(outputs**2), outputs

        arguments = match_varying_axes((variables, x, scale), ["pp"])
        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)

    (grads, *shared), outputs = on_stages(local, check_vma)(variables, x, scale)

    (expected, *expected_shared), expected_outputs = grads_in_a_row(variables, x, scale)
    assert_close(outputs[-1], expected_outputs)
    assert not np.any(outputs[:-1])
    jax.tree.map(assert_close, grads, expected)
    # Arguments that the stages share get the sum of their gradients.
    jax.tree.map(lambda a, b: assert_close(a.sum(0), b), shared, expected_shared)


@pytest.mark.parametrize("num_stages", [1, 8])
def test_any_number_of_stages(num_stages, x):
    variables = init_stages(Stage, x, num_stages=num_stages)
    outputs = on_stages(pipeline(Stage, 4).apply, num_stages=num_stages)(variables, x)
    assert_close(outputs[-1], one_after_the_other(variables, x, num_stages=num_stages))


@with_and_without_check
def test_one_step(check_vma, variables, x):
    states = jnp.stack([x + stage for stage in range(STAGES)])

    def local(own, input):
        variables, state = own
        module = Stage().bind({"params": variables["params"]["stage"]})
        return execute_pipeline_step(module, state, input, 2.0, model_axis_name="pp", shift=1.0)

    state, output = on_stages(local, check_vma)((variables, states), -x)
    expected = [
        Stage().apply(
            {"params": of_stage(variables["params"]["stage"], stage)},
            -x if stage == 0 else states[stage],
            2.0,
            shift=1.0,
        )
        for stage in range(STAGES)
    ]
    assert_close(output[-1], expected[-1])
    assert not np.any(output[:-1])
    for stage in range(1, STAGES):
        assert_close(state[stage], expected[stage - 1])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(x)), None


class Blocks(nn.Module):
    """A stage of several blocks: a scan over the local blocks."""

    num_blocks: int

    @nn.compact
    def __call__(self, x):
        run = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_blocks,
        )
        return run(name="scan")(x, None)[0]


class Model(nn.Module):
    """A network around blocks, which run in a pipeline if there are several stages."""

    num_stages: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(DIM, name="embed")(x)
        blocks = Blocks(8 // self.num_stages, name="blocks")
        if self.num_stages == 1:
            return nn.Dense(1, name="head")(blocks(x))
        x = execute_pipeline(blocks, x, num_microbatches=3, model_axis_name="pp")
        return nn.Dense(1, name="head")(x)


@with_and_without_check
def test_a_network_around_the_pipeline_and_a_divided_batch(check_vma, x):
    """Initializes parameters globally and shards them over the stages, and examples over `dp`."""
    params = Model(num_stages=1).init(jax.random.key(0), x)["params"]
    mesh = jax.make_mesh((2, STAGES), ("dp", "pp"), (AxisType.Auto,) * 2)
    specs = {"embed": P(), "blocks": P("pp"), "head": P()}

    def local(params, x):
        def loss(params):
            outputs = Model(num_stages=STAGES).apply({"params": params}, x)
            is_last = lax.axis_index("pp") == STAGES - 1
            return jnp.sum(jnp.where(is_last, outputs, 0) ** 2)

        value, grads = jax.value_and_grad(loss)(match_varying_axes(params, ["dp", "pp"]))
        shared = {name: lax.psum(grads[name], ("dp", "pp")) for name in ("embed", "head")}
        return lax.psum(value, ("dp", "pp")), shared | {"blocks": lax.psum(grads["blocks"], "dp")}

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("dp")), out_specs=(P(), specs), check_vma=check_vma
    )
    actual = jax.jit(sharded)(params, x)

    def oracle(params):
        return jnp.sum(Model(num_stages=1).apply({"params": params}, x) ** 2)

    expected = jax.jit(jax.value_and_grad(oracle))(params)
    jax.tree.map(assert_close, actual, expected)


class Masked(nn.Module):
    """A stage that skips masked examples, counts, keeps a running mean and sows its inputs."""

    @nn.compact
    def __call__(self, x):
        x, mask = x["x"], x["mask"]
        factor = self.variable("constants", "factor", lambda: jnp.float32(2.0))
        y = jnp.where(mask[:, None], jnp.tanh(nn.Dense(DIM)(x)) * factor.value, x)
        count = self.variable("state", "count", lambda: jnp.int32(0))
        mean = self.variable("state", "mean", lambda: jnp.zeros(DIM))
        y = y + 0.1 * mean.value
        if not self.is_initializing() and self.is_mutable_collection("state"):
            count.value += 1
            mean.value = 0.5 * mean.value + 0.5 * y.mean(0)
        self.sow("intermediates", "largest", y.max(0))
        return {"x": y, "mask": mask}


def masked_batch(x):
    return {"x": x, "mask": jnp.arange(BATCH) % 5 < 3}


def masked_in_order(variables, batch, num_microbatches):
    """Runs each micro-batch through all stages, passing on the state of each stage."""

    def run(states, y):
        states, largest = list(states), []
        for stage in range(STAGES):
            given = {name: of_stage(tree["stage"], stage) for name, tree in variables.items()}
            given["state"] = states[stage]
            y, changed = Masked().apply(given, y, mutable=["state", "intermediates"])
            states[stage] = changed["state"]
            largest.append(changed["intermediates"]["largest"][0])
        return states, (y["x"], jnp.stack(largest))

    states = [of_stage(variables["state"]["stage"], stage) for stage in range(STAGES)]
    parts = jax.tree.map(lambda leaf: leaf.reshape(num_microbatches, -1, *leaf.shape[1:]), batch)
    states, (outputs, largest) = lax.scan(run, states, parts)
    return outputs.reshape(BATCH, DIM), states, largest.swapaxes(0, 1)


def init_masked(batch):
    """Returns a different state for each stage, so that a misplaced state is detected."""
    variables = init_stages(Masked, batch)
    variables["state"]["stage"]["mean"] += jnp.arange(1.0, STAGES + 1)[:, None]
    variables["constants"]["stage"]["factor"] *= jnp.arange(1.0, STAGES + 1)
    return variables


@pytest.mark.parametrize(("num_microbatches", "check_vma"), [(2, True), (6, False)])
def test_state_goes_from_microbatch_to_microbatch(num_microbatches, check_vma, x):
    batch = masked_batch(x)
    variables = init_masked(batch)

    def local(variables, batch):
        params = variables["params"]

        def loss(params):
            outputs, changed = pipeline(Masked, num_microbatches).apply(
                variables | {"params": params}, batch, mutable=["state", "intermediates"]
            )
            return jnp.sum(outputs["x"] ** 2), (outputs, changed)

        return jax.grad(loss, has_aux=True)(params)

    grads, (outputs, changed) = on_stages(local, check_vma)(variables, batch)

    def oracle(params):
        outputs, *aux = masked_in_order(variables | {"params": params}, batch, num_microbatches)
        return jnp.sum(outputs**2), (outputs, *aux)

    expected_grads, (expected, states, largest) = jax.jit(jax.grad(oracle, has_aux=True))(
        variables["params"]
    )
    assert_close(outputs["x"][-1], expected)
    assert outputs["mask"].dtype == bool
    np.testing.assert_array_equal(outputs["mask"][-1], batch["mask"])
    assert not np.any(outputs["x"][:-1]) and not np.any(outputs["mask"][:-1])
    jax.tree.map(assert_close, grads, expected_grads)

    assert set(changed) == {"state", "intermediates"}
    for stage in range(STAGES):
        jax.tree.map(assert_close, of_stage(changed["state"]["stage"], stage), states[stage])
    assert np.all(changed["state"]["stage"]["count"] == num_microbatches)
    (sown,) = changed["intermediates"]["stage"]["largest"]
    assert sown.shape == (STAGES, num_microbatches, DIM)
    assert_close(sown, largest)


def test_read_only_collections_stay_as_they_are(x):
    batch = masked_batch(x)
    variables = init_masked(batch)
    outputs = on_stages(pipeline(Masked, 3).apply)(variables, batch)
    y = batch
    for stage in range(STAGES):
        given = {name: of_stage(tree["stage"], stage) for name, tree in variables.items()}
        y = jax.jit(Masked().apply)(given, y)
    assert_close(outputs["x"][-1], y["x"])


@with_and_without_check
def test_initialized_in_place(check_vma, x):
    batch = masked_batch(x)

    def init(own, batch):
        key = jax.random.fold_in(jax.random.key(3), lax.axis_index("pp"))
        outputs, variables = pipeline(Masked, 4).init_with_output(key, batch)
        return jax.tree.map(jnp.zeros_like, own), outputs, variables

    _, outputs, variables = on_stages(init, check_vma)(jnp.zeros(STAGES), batch)
    assert jax.tree.map(jnp.shape, outputs["x"]) == (STAGES, BATCH, DIM)
    kernels = variables["params"]["stage"]["Dense_0"]["kernel"]
    assert kernels.shape == (STAGES, DIM, DIM)
    assert len(np.unique(kernels)) == kernels.size
    np.testing.assert_array_equal(variables["state"]["stage"]["count"], np.zeros(STAGES))
    # The stage uses the variables that it created.
    variables = {name: variables[name] for name in ("params", "state", "constants")}
    actual = on_stages(pipeline(Masked, 4).apply, check_vma)(variables, batch)
    assert np.any(actual["x"][-1]) and not np.any(actual["x"][:-1])


class Dropping(nn.Module):
    """A stage that sows its dropout."""

    @nn.compact
    def __call__(self, x):
        kept = nn.Dropout(0.5, deterministic=False)(jnp.ones((x.shape[0], 32)))
        self.sow("intermediates", "kept", kept)
        return x


def pipeline_with_dropout(fold_stage, check_vma=True):
    """Returns a function of `x` and a seed: kept factors 0 or 2, (stages, micro-batches, -1)."""

    def local(own, x, seed):
        key = jax.random.key(seed)
        if fold_stage:
            key = jax.random.fold_in(key, lax.axis_index("pp"))
        module = pipeline(Dropping, 3)
        outputs, changed = module.apply(own, x, rngs={"dropout": key}, mutable=["intermediates"])
        kept = changed["intermediates"]["stage"]["kept"][0]
        return outputs, kept.reshape(3, -1)

    run = on_stages(local, check_vma)
    return lambda x, seed: run({}, x, seed)


@with_and_without_check
def test_dropout_drops_something_else_everywhere_and_again_the_same(check_vma, x):
    run = pipeline_with_dropout(fold_stage=True, check_vma=check_vma)
    outputs, kept = run(x, 0)
    np.testing.assert_array_equal(outputs[-1], x)
    assert set(np.unique(kept)) == {0.0, 2.0}
    assert len(np.unique(kept.reshape(STAGES * 3, -1), axis=0)) == STAGES * 3
    np.testing.assert_array_equal(run(x, 0)[1], kept)
    assert np.any(run(x, 1)[1] != kept)


def test_dropout_with_one_key_for_all_stages_is_that_of_the_tick(x):
    _, kept = pipeline_with_dropout(fold_stage=False)(x, 0)
    assert len(np.unique(kept[0], axis=0)) == 3
    for stage in range(1, STAGES):
        np.testing.assert_array_equal(kept[stage, :-1], kept[stage - 1, 1:])


class Normalizing(nn.Module):
    """A stage that turns zeros into NaN, forward and backward."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(DIM, use_bias=False)(x)
        return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))


def test_the_bubble_makes_no_nan(x):
    assert np.all(np.isnan(Normalizing().init_with_output(jax.random.key(0), 0 * x)[0]))
    variables = init_stages(Normalizing, x)

    def local(variables, x):
        def loss(variables):
            outputs = pipeline(Normalizing, 2).apply(variables, x)
            return jnp.sum(outputs[:, 0]), outputs

        return jax.grad(loss, has_aux=True)(variables)

    grads, outputs = on_stages(local)(variables, x)
    assert np.all(np.isfinite(outputs))
    assert np.all(np.isfinite(jax.tree.leaves(grads)))
    assert np.any(outputs[-1])


def test_the_stage_is_traced_as_often_whatever_the_number_of_microbatches(variables, x):
    def traces(num_microbatches):
        calls = []

        class Counting(Stage):
            @nn.compact
            def __call__(self, x):
                calls.append(1)
                return nn.Dense(DIM)(x)

        on_stages(pipeline(Counting, num_microbatches).apply)(variables, x)
        return len(calls)

    assert traces(2) == traces(12) < 12


@pytest.mark.parametrize(
    ("num_microbatches", "message"),
    [(5, "24 examples does not divide into 5 microbatches"), (0, "num_microbatches=0.*at least 1")],
)
def test_numbers_of_microbatches_that_do_not_fit(num_microbatches, message, variables, x):
    with pytest.raises(ValueError, match=message):
        on_stages(pipeline(Stage, num_microbatches).apply)(variables, x)


def test_bubble_fraction():
    assert bubble_fraction(4, 1) == 3 / 4
    assert bubble_fraction(4, 12) == 3 / 15
    assert bubble_fraction(1, 5) == 0
