import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm.distributed.data_parallel import (
    axes_of,
    gather_on_use,
    gather_parameters,
    shard_parameters,
    sum_gradients,
)
from xlstm.distributed.hlo_collectives import find_collectives
from xlstm.distributed.mesh import match_varying_axes

B, D, BLOCKS, FINE = 16, 8, 3, 2**-10  # 1 + FINE is 1 in bfloat16.
MESH = jax.make_mesh((2, 4), ("dp", "fsdp"), (AxisType.Auto,) * 2)
with_and_without_check = pytest.mark.parametrize("check_vma", [True, False])


def assert_close(actual, expected):
    """Asserts equality up to rounding, relative to the largest element."""
    atol = 1e-5 * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def shard(fn, in_specs, out_specs, check_vma=True):
    """Returns the function on the mesh."""
    return jax.jit(
        jax.shard_map(fn, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


def box(*names, shape, abstract=False):
    value = jax.ShapeDtypeStruct(shape, jnp.float32) if abstract else jnp.zeros(shape)
    return nn.Partitioned(value, names)


def names_of(*names, shape, num_shards=4, min_weight_size=0, **kwargs):
    """Returns the names of a parameter after sharding."""
    tree = shard_parameters(
        box(*names, shape=shape), num_shards, min_weight_size=min_weight_size, **kwargs
    )
    return tree.names


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        ((None, None), (8, 12), (None, "fsdp")),
        ((None, None), (12, 8), ("fsdp", None)),
        ((None, None), (8, 8), ("fsdp", None)),
        # The largest dimension is already sharded, or not divisible.
        ((None, "tp"), (8, 64), ("fsdp", "tp")),
        ((("pp", "tp"), None), (64, 8), (("pp", "tp"), "fsdp")),
        (("pp", None, "tp"), (16, 4, 8), ("pp", "fsdp", "tp")),
        ((None, None), (8, 13), ("fsdp", None)),
        # No dimension is free.
        ((None, None), (7, 13), (None, None)),
        (("tp",), (8,), ("tp",)),
        # The parameter is already sharded.
        (("fsdp", None), (8, 16), ("fsdp", None)),
        ((("fsdp", "tp"), None), (8, 16), (("fsdp", "tp"), None)),
    ],
)
def test_the_largest_free_dimension_is_cut(names, shape, expected):
    assert names_of(*names, shape=shape) == expected


def test_small_parameters_stay_whole():
    assert names_of(None, None, shape=(8, 16), min_weight_size=128) == (None, "fsdp")
    assert names_of(None, None, shape=(8, 16), min_weight_size=129) == (None, None)
    # Stacked small parameters are gathered one by one; other sharded dimensions count in full.
    assert names_of("pp", None, shape=(9, 128), min_weight_size=129) == ("pp", None)
    assert names_of("tp", None, shape=(9, 128), min_weight_size=129) == ("tp", "fsdp")
    stack = {"stack_axis": "tp", "min_weight_size": 129}
    assert names_of("tp", None, shape=(9, 128), **stack) == ("tp", None)


def test_another_axis_and_one_without_devices():
    assert names_of(None, shape=(8,), axis_name="data") == ("data",)
    assert names_of(None, shape=(8,), num_shards=1) == (None,)


def test_the_tree_stays_as_it_is():
    params = {"plain": jnp.ones((8, 8)), "box": box(None, shape=(8,), abstract=True)}
    sharded = shard_parameters(params, 4, min_weight_size=0)
    assert sharded["plain"] is params["plain"]
    assert sharded["box"].names == ("fsdp",)
    assert sharded["box"].value is params["box"].value
    assert params["box"].names == (None,)


def test_axes_of_names():
    assert axes_of((None, "fsdp", ("pp", "tp"), None)) == ("fsdp", "pp", "tp")
    assert axes_of(()) == ()


class Block(nn.Module):
    """A residual block with a large and a small parameter."""

    @nn.compact
    def __call__(self, x, _=None):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
        kernel = self.param("kernel", kernel_init, (x.shape[-1], D), unbox=False)
        bias_init = nn.with_partitioning(nn.initializers.normal(1.0), (None,))
        bias = self.param("bias", bias_init, (D,), unbox=False)
        return x + jnp.tanh(x @ kernel.value + bias.value), None


class Net(nn.Module):
    """A single block, and a stack of blocks."""

    @nn.compact
    def __call__(self, x):
        x, _ = gather_on_use(Block)(name="first")(x)
        stack = nn.scan(
            nn.remat(gather_on_use(Block)),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=BLOCKS,
            metadata_params={nn.PARTITION_NAME: "pp"},
        )
        return stack(name="stack")(x, None)[0]


def net_loss(params, x):
    return jnp.sum(Net().apply({"params": params}, x) ** 2)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, D))


@pytest.fixture(scope="module")
def params(x):
    """Returns whole parameters in boxes that say how to shard them."""
    params = Net().init(jax.random.key(0), x)["params"]
    return shard_parameters(params, 4, min_weight_size=D * D)


def specs_of(params):
    """Returns partition specs without the axis `pp`, which this mesh lacks."""

    def spec(names):
        return P(*(name if name == "fsdp" else None for name in names))

    return jax.tree.map(lambda box: box.replace(value=spec(box.names)), params, is_leaf=is_box)


def is_box(x):
    return isinstance(x, nn.Partitioned)


def sharded_grads(params, check_vma):
    def local(params, x):
        grads = jax.grad(net_loss)(match_varying_axes(params, ["dp", "fsdp"]), x)
        return sum_gradients(grads, ("dp", "fsdp"))

    specs = specs_of(params)
    return shard(local, (specs, P(("dp", "fsdp"))), specs, check_vma)


@with_and_without_check
def test_gathering_on_use_equals_whole_parameters(check_vma, params, x):
    names = jax.tree.map(lambda box: box.names, params, is_leaf=is_box)
    assert names == {
        "first": {"kernel": ("fsdp", None), "bias": (None,)},
        "stack": {"kernel": ("pp", "fsdp", None), "bias": ("pp", None)},
    }
    grads = sharded_grads(params, check_vma)(params, x)
    jax.tree.map(assert_close, grads, jax.grad(net_loss)(params, x))


def test_blocks_are_gathered_one_at_a_time_and_again_in_the_backward_pass(params, x):
    program = sharded_grads(params, True).lower(params, x).compile().as_text()
    loops = {"all-gather": [], "reduce-scatter": []}
    for collective in find_collectives(program, MESH):
        if collective.kind in loops:
            assert collective.num_bytes == 4 * D * D
            loops[collective.kind].append(collective.loops)
    assert sorted(loops["all-gather"]) == [(), (BLOCKS,), (BLOCKS,)]
    assert sorted(loops["reduce-scatter"]) == [(), (BLOCKS,)]


def test_outside_of_shard_map_it_is_the_class_itself():
    assert gather_on_use(Block) is Block


@with_and_without_check
def test_a_function_of_a_module(check_vma, params, x):
    class Whole(nn.Module):
        def setup(self):
            self.block = Block()

        def __call__(self, x):
            return gather_on_use(lambda self, x: self.block(x)[0])(self, x)

    block = params["first"]

    def local(block, x):
        return Whole().apply({"params": {"block": block}}, x)

    rows = P(("dp", "fsdp"))
    actual = shard(local, (specs_of(block), rows), rows, check_vma)(block, x)
    assert_close(actual, Block().apply({"params": block}, x)[0])


@with_and_without_check
@pytest.mark.parametrize("gather_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scatter_dtype", [jnp.float32, jnp.bfloat16])
def test_types_in_which_weights_and_gradients_are_sent(gather_dtype, scatter_dtype, check_vma):
    weights = nn.Partitioned(jnp.full((D,), 1 + FINE), ("fsdp",))

    def local(weights):
        weights = match_varying_axes(weights, ["fsdp"])

        def loss(weights):
            whole = gather_parameters(
                weights, gather_dtype=gather_dtype, scatter_dtype=scatter_dtype
            )
            assert whole.names == (None,)
            return jnp.sum(whole.value * (1 + FINE)), whole.value

        grads, whole = jax.grad(loss, has_aux=True)(weights)
        return grads, whole[None]

    specs = specs_of(weights)
    run = shard(local, (specs,), (specs, P("fsdp")), check_vma=check_vma)
    grads, whole = run(weights)
    assert grads.value.dtype == whole.dtype == jnp.float32
    fine = {jnp.float32: 1 + FINE, jnp.bfloat16: 1.0}
    np.testing.assert_array_equal(whole, np.full((4, D), fine[gather_dtype]))
    # The sum over the four devices.
    np.testing.assert_array_equal(grads.value, np.full(D, 4 * fine[scatter_dtype]))


def test_only_boxes_that_name_the_axis_are_gathered():
    params = {"plain": jnp.ones(D), "other": nn.Partitioned(jnp.ones((D, 2)), ("tp", None))}
    gathered = shard(lambda params: gather_parameters(params), P(), P())(params)
    jax.tree.map(np.testing.assert_array_equal, gathered, params)


GRADIENTS = {
    "plain": (D,),
    "whole": (None, None),
    "fsdp": (None, "fsdp"),
    "dp": ("dp", None),
    "both": ("fsdp", "dp"),
    "nested": (("dp", "fsdp"), None),
    "other": ("tp", None),
}


def boxed_gradients(index):
    """Returns local gradients whose values identify the device."""
    grads = {name: nn.Partitioned(10.0**index * jnp.ones((2, 2)), names)
             for name, names in GRADIENTS.items()}  # fmt: skip
    return grads | {"plain": grads["plain"].value}


@with_and_without_check
def test_gradients_are_summed_over_the_axes_that_a_parameter_is_not_cut_over(check_vma):
    def local(index):
        grads = boxed_gradients(index[0])
        summed = sum_gradients(grads, ("dp", "fsdp"))
        assert jax.tree.structure(summed) == jax.tree.structure(grads)
        return jax.tree.map(lambda x: match_varying_axes(x, ["dp", "fsdp"])[:1, 0], summed)

    devices = P(("dp", "fsdp"))
    summed = shard(local, devices, devices, check_vma)(jnp.arange(8.0))
    # Device (dp, fsdp) has the number 4 dp + fsdp.
    one = 10.0 ** np.arange(8)
    all_ = np.full(8, one.sum())
    over_dp = np.tile(one.reshape(2, 4).sum(0), 2)
    over_fsdp = np.repeat(one.reshape(2, 4).sum(1), 4)
    expected = {"plain": all_, "whole": all_, "other": all_, "fsdp": over_dp, "dp": over_fsdp}
    expected |= {"both": one, "nested": one}
    for name, values in expected.items():
        leaf = summed[name] if name == "plain" else summed[name].value
        np.testing.assert_allclose(leaf, values, rtol=1e-6, err_msg=name)


def test_gradients_with_the_same_axes_are_summed_at_once():
    def local(index):
        grads, leaves = boxed_gradients(index[0]), iter(range(len(GRADIENTS)))
        grads = jax.tree.map(lambda leaf: leaf + next(leaves), grads)
        return sum_gradients(grads, ("dp", "fsdp"))

    program = shard(local, P(("dp", "fsdp")), P(), False).lower(jnp.arange(8.0)).compile()
    sums = find_collectives(program.as_text(), MESH)
    assert sorted((c.kind, c.axes) for c in sums) == [
        ("all-reduce", axes) for axes in [("dp",), ("dp", "fsdp"), ("fsdp",)]
    ]


def test_outside_of_shard_map_there_is_nothing_to_sum():
    grads = boxed_gradients(1.0)
    jax.tree.map(np.testing.assert_array_equal, sum_gradients(grads, ("dp", "fsdp")), grads)
