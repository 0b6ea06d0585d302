"""The flag `--mesh` of the tools that use a trained model on a mesh of their own."""

from absl import flags

from xlstm.distributed.mesh import MESH_AXES

_MESH = flags.DEFINE_list("mesh", [], "Sizes of the mesh, such as fsdp=4,tp=2 [dp alone].")


def mesh_sizes() -> dict[str, int]:
    """The size of every mesh axis; raises ValueError where the flag is no list of sizes."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {"dp": -1}
    for entry in _MESH.value:
        axis, _, size = entry.partition("=")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise ValueError(f"--mesh has {entry!r}: write sizes as fsdp=4,tp=2")
        sizes[axis] = int(size)
    return sizes
