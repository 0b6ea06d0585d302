"""The device mesh: named axes over which data, parameters and work are divided.

The training step runs in `jax.shard_map` over the whole mesh. There one rule holds for every axis:
a device's loss is what it alone contributes, the loss is the sum over all devices, and a
parameter's gradient is summed over the axes that the parameter is not cut over.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh

from xlstm.common_types import DTYPES, PyTree

# Outermost to innermost: neighbouring devices, with the fastest links, share a `tp` group.
MESH_AXES = ("dp", "fsdp", "pp", "tp")
# The axes that divide the examples of a batch.
BATCH_AXES = ("dp", "fsdp")
# The axes that divide the vocabulary: of the embedding, the head and the loss.
VOCAB_AXES = ("pp", "tp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, one of which may be -1 for the rest, and how they are used."""

    dp: int = -1  # Replicas: the batch is divided, parameters are repeated; -1 takes the rest.
    fsdp: int = 1  # Shards of parameters and optimizer state; divides the batch too.
    pp: int = 1  # Pipeline stages: the blocks are divided, and the vocabulary.
    tp: int = 1  # Tensor parallelism: heads, hidden features, the vocabulary, and between the
    # layers the tokens of a sequence are divided.
    fsdp_min_weight_size: int = 2**16  # Smaller weights, counted in elements, are not cut by fsdp.
    fsdp_gather_dtype: str = "float32"  # Type in which fsdp sends weights, float32 or bfloat16.
    fsdp_scatter_dtype: str = "float32"  # Type in which fsdp sums gradients, float32 or bfloat16.
    tp_overlap: bool = False  # Send and multiply at once: tp works in a ring, chunk by chunk.
    num_microbatches: int = -1  # Parts of a minibatch that follow each other through the pipeline;
    # -1 for as many as there are stages.

    def __post_init__(self):
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(f"mesh {_describe(sizes)}: a size is at least 1, or -1 for the rest")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh {_describe(sizes)}: only one size can be -1")
        if self.fsdp_min_weight_size < 0:
            raise ValueError(
                f"mesh.fsdp_min_weight_size={self.fsdp_min_weight_size}: it must not be negative"
            )
        for name in ("fsdp_gather_dtype", "fsdp_scatter_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"mesh.{name}={getattr(self, name)!r} is unknown; there are {', '.join(DTYPES)}"
                )
        if self.num_microbatches < 1 and self.num_microbatches != -1:
            raise ValueError(
                f"mesh.num_microbatches={self.num_microbatches}: it is at least 1, or -1 for as"
                " many as there are pipeline stages"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes as they were given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def count_microbatches(self, num_stages: int) -> int:
        """The number of micro-batches of a pipeline with so many stages; 1 without a pipeline."""
        if num_stages == 1:
            return 1
        return num_stages if self.num_microbatches == -1 else self.num_microbatches

    @property
    def gather_dtype(self) -> jnp.dtype:
        """Type in which weights are sent."""
        return DTYPES[self.fsdp_gather_dtype]

    @property
    def scatter_dtype(self) -> jnp.dtype:
        """Type in which gradients are summed."""
        return DTYPES[self.fsdp_scatter_dtype]


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes `MESH_AXES`.

    Args:
        config: Sizes of the axes.
        devices: The devices to use, all of them by default.

    Returns:
        A mesh in which devices that are neighbours in `devices`, on TPUs in the torus of their
        links, are neighbours along `tp`.

    Raises:
        ValueError: If the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes
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
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types, devices=devices)


def axis_size(axis_names: str | Sequence[str]) -> int:
    """The number of devices along mesh axes here; 1 outside of a `shard_map` over them."""
    return math.prod(lax.axis_size(name) for name in bound_axes(axis_names))


def axis_index(axis_names: str | Sequence[str]) -> jax.Array | int:
    """This device's place along mesh axes, the first the slowest; 0 outside of a `shard_map`."""
    axes = bound_axes(axis_names)
    return lax.axis_index(axes) if axes else 0


def bound_axes(axis_names: str | Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh axes that are manual here, which is to say inside of a `shard_map`."""
    names = (axis_names,) if isinstance(axis_names, str) else axis_names
    return tuple(name for name in names if _is_bound(name))


def _is_bound(axis_name: str) -> bool:
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def vary_alike(tree: PyTree, axis_names: Sequence[str] = ()) -> PyTree:
    """Marks all arrays of a tree as varying over the mesh axes that any of them varies over.

    Under `shard_map`'s check of what varies (`check_vma`, the default) the carry of a scan must do
    so from the beginning, and gradients must vary as their arguments. Elsewhere it does nothing.

    Args:
        tree: Tree of arrays.
        axis_names: Axes over which they vary besides.

    Returns:
        The same tree.
    """
    axes = varying_axes(tree).union(axis_names)

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The mesh axes of a `shard_map` that the arrays of a tree, or their shapes, vary over."""
    types = [
        jax.typeof(x) if isinstance(x, jax.Array) else x
        for x in jax.tree.leaves(tree)
        if isinstance(x, (jax.Array, jax.ShapeDtypeStruct))
    ]
    # A shape made outside of a `shard_map` says nothing.
    marks = [getattr(t, "vma", None) or getattr(t, "manual_axis_type", None) for t in types]
    return frozenset().union(*(getattr(mark, "varying", mark) for mark in marks if mark))
