import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import (
    BATCH_AXES,
    MESH_AXES,
    VOCAB_AXES,
    MeshConfig,
    axis_index,
    axis_size,
    bound_axes,
    create_mesh,
    match_varying_axes,
    varying_axes,
)


def sizes(**kwargs):
    return dict(create_mesh(MeshConfig(**kwargs)).shape)


def test_all_devices_are_replicas_by_default():
    assert sizes() == {"dp": 8, "fsdp": 1, "pp": 1, "cp": 1, "tp": 1}


def test_given_sizes():
    given = {"dp": 1, "fsdp": 2, "pp": 1, "cp": 2, "tp": 2}
    assert sizes(**given) == given


@pytest.mark.parametrize("axis", MESH_AXES)
def test_any_axis_can_take_the_rest(axis):
    given = dict.fromkeys(MESH_AXES, 1) | {"dp": 2, "tp": 2} | {axis: -1}
    rest = 8 // int(np.prod([size for size in given.values() if size != -1]))
    assert sizes(**given) == given | {axis: rest}


def test_neighboring_devices_share_a_tp_group():
    mesh = create_mesh(MeshConfig(dp=2, cp=2, tp=2))
    assert mesh.axis_names == MESH_AXES == ("dp", "fsdp", "pp", "cp", "tp")
    assert set(BATCH_AXES) < set(MESH_AXES)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(4, 2), np.arange(8).reshape(4, 2))
    # dp is the outermost axis: its neighbors are half of the devices apart.
    np.testing.assert_array_equal(ids[1] - ids[0], np.full((1, 1, 2, 2), 4))


def test_a_part_of_the_devices_in_a_given_order():
    devices = jax.devices()[5:1:-1]
    mesh = create_mesh(MeshConfig(tp=4), devices)
    assert list(mesh.devices.flat) == devices
    assert mesh.shape["tp"] == 4


def test_axes_are_automatic():
    mesh = create_mesh(MeshConfig())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tp": 3}, "tp=3 needs a multiple of 3 devices; found 8"),
        ({"dp": 1, "tp": 16}, "needs a multiple of 16 devices; found 8"),
        ({"dp": 2, "tp": 2}, "uses only 4 of 8 devices; set one size to -1"),
    ],
)
def test_sizes_that_do_not_fit_the_devices(config, message):
    with pytest.raises(ValueError, match=message):
        create_mesh(MeshConfig(**config))


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_that_make_no_sense(size):
    with pytest.raises(ValueError, match=f"fsdp={size}.*at least 1, or -1"):
        MeshConfig(fsdp=size)


def test_only_one_axis_takes_the_rest():
    with pytest.raises(ValueError, match="dp=-1, fsdp=1, pp=1, cp=1, tp=-1: expected at most one"):
        MeshConfig(tp=-1)


def test_smallest_weight_that_fsdp_cuts():
    assert MeshConfig(fsdp_min_weight_size=0).fsdp_min_weight_size == 0
    with pytest.raises(ValueError, match="fsdp_min_weight_size=-1: it must not be negative"):
        MeshConfig(fsdp_min_weight_size=-1)


def test_types_in_which_fsdp_communicates():
    config = MeshConfig()
    assert (config.gather_dtype, config.scatter_dtype) == (jnp.float32, jnp.float32)
    config = MeshConfig(fsdp_gather_dtype="bfloat16")
    assert (config.gather_dtype, config.scatter_dtype) == (jnp.bfloat16, jnp.float32)
    config = MeshConfig(fsdp_scatter_dtype="bfloat16")
    assert (config.gather_dtype, config.scatter_dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("field", ["fsdp_gather_dtype", "fsdp_scatter_dtype"])
def test_types_that_there_are_not(field):
    with pytest.raises(ValueError, match=f"{field}='int8' is unknown.*float32, bfloat16"):
        MeshConfig(**{field: "int8"})


def test_number_of_microbatches():
    assert MeshConfig().count_microbatches(4) == 4
    assert MeshConfig(num_microbatches=6).count_microbatches(4) == 6
    assert MeshConfig(num_microbatches=6).count_microbatches(1) == 1


@pytest.mark.parametrize("number", [0, -2])
def test_numbers_of_microbatches_that_make_no_sense(number):
    with pytest.raises(ValueError, match=f"num_microbatches={number}: it must be at least 1"):
        MeshConfig(num_microbatches=number)


with_and_without_check = pytest.mark.parametrize("check_vma", [True, False])


def on_mesh(fn, out_specs, check_vma=True, axis_names=frozenset(MESH_AXES)):
    """Returns the output of the function on a mesh of pp=2, tp=4."""
    mesh = create_mesh(MeshConfig(pp=2, tp=4))
    return jax.jit(
        jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=(),
            out_specs=out_specs,
            check_vma=check_vma,
            axis_names=axis_names,
        )
    )()


def test_outside_of_shard_map_every_axis_has_one_device():
    assert bound_axes(MESH_AXES) == ()
    assert axis_size("tp") == axis_size(VOCAB_AXES) == 1
    assert axis_index("tp") == axis_index(VOCAB_AXES) == 0


@with_and_without_check
def test_sizes_and_places_inside_of_shard_map(check_vma):
    def places():
        assert bound_axes((*MESH_AXES, "context")) == MESH_AXES
        assert (axis_size("pp"), axis_size("tp"), axis_size("dp")) == (2, 4, 1)
        assert axis_size(("tp", "context", "pp")) == 8
        assert axis_size("context") == axis_size(()) == 1
        assert axis_index("context") == axis_index(()) == 0
        indices = [axis_index(axes) for axes in ("pp", "tp", ("pp", "tp"), ("tp", "pp"))]
        return jnp.stack(
            [jnp.asarray(match_varying_axes(index, ["pp", "tp"])) for index in indices]
        )[None]

    actual = on_mesh(places, P(("pp", "tp")), check_vma)
    expected = [[pp, tp, 4 * pp + tp, 2 * tp + pp] for pp in range(2) for tp in range(4)]
    np.testing.assert_array_equal(actual, expected)


def test_only_manual_axes_are_bound():
    def check():
        assert bound_axes(MESH_AXES) == ("tp",)
        assert axis_size(VOCAB_AXES) == 4
        return jnp.zeros(())

    on_mesh(check, P(), axis_names={"tp"})


def test_marked_to_vary_alike():
    def check():
        tree = {"tp": lax.axis_index("tp") * 1.0, "none": jnp.ones(3), "other": jnp.int32(1)}
        assert varying_axes(tree) == {"tp"}
        assert varying_axes(tree["none"]) == set()
        alike = match_varying_axes(tree)
        assert [varying_axes(leaf) for leaf in jax.tree.leaves(alike)] == [{"tp"}] * 3
        more = match_varying_axes(tree, ["pp"])
        assert [varying_axes(leaf) for leaf in jax.tree.leaves(more)] == [{"pp", "tp"}] * 3
        return jax.tree.map(lambda x: x[None], more)

    values = on_mesh(check, P(("pp", "tp")))
    np.testing.assert_array_equal(values["tp"], np.tile(np.arange(4.0), 2))
    np.testing.assert_array_equal(values["none"], np.ones((8, 3)))
    np.testing.assert_array_equal(values["other"], np.ones(8))


def test_without_the_check_and_outside_nothing_is_marked():
    def check():
        x = jnp.ones(3)
        assert match_varying_axes({"x": x, "index": lax.axis_index("tp")})["x"] is x
        return x

    on_mesh(check, P(), check_vma=False)
    tree = {"x": jnp.ones(3), "number": 2.0}
    assert match_varying_axes(tree)["x"] is tree["x"]
    assert varying_axes(tree) == set()
