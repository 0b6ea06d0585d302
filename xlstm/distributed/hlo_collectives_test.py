import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from xlstm.distributed.hlo_collectives import find_collectives
from xlstm.distributed.mesh import MeshConfig, create_mesh

_MESH = create_mesh(MeshConfig(dp=2, cp=2, tp=2))
_SHAPE = (4, 8)  # Shape of a local array of 128 bytes.


def _compiled(fn):
    x = jax.ShapeDtypeStruct((2 * _SHAPE[0], _SHAPE[1]), jnp.float32)
    mapped = jax.shard_map(fn, mesh=_MESH, in_specs=P("dp"), out_specs=P("dp"), check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


def _found(fn):
    return [(c.kind, c.axes, c.loops, c.num_bytes) for c in find_collectives(_compiled(fn), _MESH)]


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda x: lax.psum(x, "dp"), ("all-reduce", ("dp",), (), 128)),
        (lambda x: lax.psum(x, ("dp", "tp")), ("all-reduce", ("dp", "tp"), (), 128)),
        (lambda x: lax.all_gather(x, "tp"), ("all-gather", ("tp",), (), 256)),
        (
            lambda x: lax.psum_scatter(x, ("cp", "tp"), scatter_dimension=0, tiled=True),
            ("reduce-scatter", ("cp", "tp"), (), 128),
        ),
        (
            lambda x: lax.ppermute(x, "cp", [(0, 1), (1, 0)]),
            ("collective-permute", ("cp",), (), 128),
        ),
        (lambda x: lax.ppermute(x, "cp", [(0, 1)]), ("collective-permute", ("cp",), (), 128)),
        (
            lambda x: lax.all_to_all(x, ("cp", "tp"), 0, 1, tiled=True),
            ("all-to-all", ("cp", "tp"), (), 128),
        ),
        (
            lambda x: lax.all_to_all(x, "tp", 0, 1, tiled=True),
            ("all-to-all", ("tp",), (), 128),
        ),
    ],
)
def test_kind_axes_and_size(fn, expected):
    assert _found(fn) == [expected]


def test_collectives_in_loops_count_as_often_as_the_loops_run():
    def inner(x, _):
        return lax.ppermute(jnp.sin(x), "tp", [(0, 1), (1, 0)]), None

    def outer(x, _):
        x, _ = lax.scan(inner, x, length=5)
        return x * lax.psum(jnp.sum(x), "dp"), None

    def fn(x):
        return lax.all_gather(lax.scan(outer, x, length=3)[0], "cp")

    found = find_collectives(_compiled(fn), _MESH)
    assert {(c.kind, c.axes, c.loops, c.count) for c in found} == {
        ("collective-permute", ("tp",), (3, 5), 15),
        ("all-reduce", ("dp",), (3,), 3),
        ("all-gather", ("cp",), (), 1),
    }
    assert all("shard_map" in c.source for c in found)


def test_a_loop_without_an_end_in_sight_is_an_error():
    def fn(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: lax.psum(x, "dp"), x)

    with pytest.raises(ValueError, match="all-reduce is in a loop without a known trip count"):
        _found(fn)


def test_what_stays_on_a_device_is_not_counted():
    one = create_mesh(MeshConfig(), jax.devices()[:1])
    mapped = jax.shard_map(
        lambda x: lax.psum(x, "dp"), mesh=one, in_specs=P("dp"), out_specs=P("dp"), check_vma=False
    )
    program = jax.jit(mapped).lower(jnp.ones(4)).compile().as_text()
    assert find_collectives(program, one) == []


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tp",)),
        ("[4,2]<=[8]", ("tp",)),
        ("[4,2]<=[2,4]T(1,0)", ("dp",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("cp",)),
        ("[1,8]<=[8]", ("dp", "cp", "tp")),
        ("mesh['dp'=2,'fsdp'=1,'pp'=1,'cp'=2,'tp'=2] {'cp'}", ("cp",)),
        ("mesh['dp'=2,'fsdp'=1,'pp'=1,'cp'=2,'tp'=2] {'tp','dp'}", ("dp", "tp")),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tp",)),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,0,1)) {'b'}", ("dp",)),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,2,6,1,5,3,7) {'b'}", ("dp",)),
        ("mesh['a'=8] {'a':(1)2}", ("dp",)),
        ("mesh['a'=8] {'a':(2)2}", ("cp",)),
        ("mesh['a'=8] {'a':(2)4}", ("cp", "tp")),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("dp", "tp")),
    ],
)
def test_all_ways_of_writing_groups(groups, axes):
    program = "\n".join(
        [
            "ENTRY %main (x: bf16[3,2]) -> bf16[3,2] {",
            "  %x = bf16[3,2]{1,0} parameter(0)",
            f"  ROOT %y = bf16[3,2]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%add",
            "}",
        ]
    )
    (found,) = find_collectives(program, _MESH)
    assert found.axes == axes and found.num_bytes == 12
    assert np.prod([_MESH.shape[axis] for axis in axes]) > 1


@pytest.mark.parametrize(
    "instruction, num_bytes",
    [
        ("(f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x)", 256),
        ("((f32[8]{0}, f32[2]{0}), (f32[16]{0}, f32[4]{0})) all-gather-start(%x, %z)", 80),
        ("(f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x)", 128),
        ("f32[8,4]{1,0} all-reduce-start(%x)", 128),
        ("(f32[8]{0}, f32[]) all-reduce-start(%x, %z)", 36),
    ],
)
def test_asynchronous_collectives(instruction, num_bytes):
    groups = "source_target_pairs" if "permute" in instruction else "replica_groups"
    program = f"ENTRY %main () -> f32[] {{\n  %y = {instruction}, {groups}={{{{0,1}},{{2,3}}}}\n}}"
    (found,) = find_collectives(program, _MESH)
    assert found.axes == ("tp",) and found.num_bytes == num_bytes
