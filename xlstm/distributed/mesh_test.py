import jax
import numpy as np
import pytest

from xlstm.distributed.mesh import BATCH_AXES, MESH_AXES, MeshConfig, create_mesh


def sizes(**kwargs):
    return dict(create_mesh(MeshConfig(**kwargs)).shape)


def test_all_devices_are_replicas_by_default():
    assert sizes() == {"dp": 8, "fsdp": 1, "pp": 1, "tp": 1}


def test_given_sizes():
    assert sizes(dp=1, fsdp=2, pp=2, tp=2) == {"dp": 1, "fsdp": 2, "pp": 2, "tp": 2}


@pytest.mark.parametrize("axis", MESH_AXES)
def test_any_axis_can_take_the_rest(axis):
    given = dict.fromkeys(MESH_AXES, 1) | {"dp": 2, "tp": 2} | {axis: -1}
    rest = 8 // int(np.prod([size for size in given.values() if size != -1]))
    assert sizes(**given) == given | {axis: rest}


def test_neighbouring_devices_share_a_tp_group():
    mesh = create_mesh(MeshConfig(dp=2, pp=2, tp=2))
    assert mesh.axis_names == MESH_AXES == ("dp", "fsdp", "pp", "tp")
    assert set(BATCH_AXES) < set(MESH_AXES)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(4, 2), np.arange(8).reshape(4, 2))
    # dp is the outermost: its neighbours are half of the devices apart.
    np.testing.assert_array_equal(ids[1] - ids[0], np.full((1, 2, 2), 4))


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
        ({"tp": 3}, "tp=3 needs a multiple of 3 devices, there are 8"),
        ({"dp": 1, "tp": 16}, "needs a multiple of 16 devices, there are 8"),
        ({"dp": 2, "tp": 2}, "uses 4 of 8 devices; set one size to -1"),
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
    with pytest.raises(ValueError, match="dp=-1, fsdp=1, pp=1, tp=-1: only one"):
        MeshConfig(tp=-1)
