"""The device mesh: named axes over which data, parameters and work are divided."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# Outermost to innermost: neighbouring devices, with the fastest links, share a `tp` group.
MESH_AXES = ("dp", "fsdp", "pp", "tp")
# The axes that divide the examples of a batch.
BATCH_AXES = ("dp", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    dp: int = -1  # Replicas: the batch is divided, parameters are repeated; -1 takes the rest.
    fsdp: int = 1  # Shards of parameters and optimizer state; divides the batch too.
    pp: int = 1  # Pipeline stages: the blocks are divided.
    tp: int = 1  # Tensor parallelism: heads and hidden features are divided.

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(f"mesh {_describe(sizes)}: a size is at least 1, or -1 for the rest")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh {_describe(sizes)}: only one size can be -1")


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes `MESH_AXES`.

    Args:
        config: Sizes of the axes.
        devices: The devices to use, all of them by default.

    Returns:
        A mesh in which devices that are neighbours in `devices` are neighbours along `tp`.

    Raises:
        ValueError: If the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(config)
    given = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), given)
    if remainder or rest == 0:
        raise ValueError(
            f"mesh {_describe(sizes)} needs a multiple of {given} devices, there are {len(devices)}"
        )
    if -1 not in sizes.values() and rest != 1:
        raise ValueError(
            f"mesh {_describe(sizes)} uses {given} of {len(devices)} devices;"
            " set one size to -1 to use them all"
        )
    shape = [rest if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES]
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
