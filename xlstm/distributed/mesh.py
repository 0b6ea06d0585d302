"""The device mesh: named axes over which data, parameters and work are sharded.

The training step runs in `jax.shard_map` over the whole mesh, where one rule holds for every axis:
the local loss is the device's own contribution, the loss is the sum over all devices, and the
gradient of a parameter is summed over the axes that the parameter is not sharded over.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh

from xlstm.common_types import DTYPES, PyTree

# From the outermost to the innermost: neighboring devices, with the fastest links, share `tp`.
MESH_AXES = ("dp", "fsdp", "pp", "cp", "tp")
# The axes that the examples of a batch are sharded over.
BATCH_AXES = ("dp", "fsdp")
# The axes that the tokens of a sequence are sharded over, between the layers.
TOKEN_AXES = ("cp", "tp")
# The axes that the vocabulary is sharded over, in the embedding, the head and the loss.
VOCAB_AXES = ("pp", "tp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, one of which can be -1 for the remaining devices, and options."""

    dp: int = -1  # Data parallelism: number of replicas, which share the batch; -1 takes all
    # remaining devices.
    fsdp: int = 1  # Fully sharded data parallelism: number of shards of parameters and optimizer
    # state, which also share the batch.
    pp: int = 1  # Pipeline parallelism: number of stages, which share the blocks and the
    # vocabulary.
    cp: int = 1  # Context parallelism: number of devices that share the tokens of each sequence, in
    # contiguous parts.
    tp: int = 1  # Tensor parallelism: number of devices that share the heads, hidden features and
    # vocabulary, and, between the layers, the tokens of each sequence.
    fsdp_min_weight_size: int = 2**16  # Number of elements below which fsdp does not shard a
    # weight.
    fsdp_gather_dtype: str = "float32"  # Type in which fsdp sends weights, float32 or bfloat16.
    fsdp_scatter_dtype: str = "float32"  # Type in which fsdp sums gradients, float32 or bfloat16.
    tp_overlap: bool = False  # Whether tp overlaps communication with products, in a ring.
    num_microbatches: int = -1  # Number of micro-batches that pass through the pipeline one after
    # the other; -1 for the number of stages.

    def __post_init__(self):
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(
                f"mesh {_describe(sizes)}: expected sizes of at least 1, or -1 for the rest"
            )
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh {_describe(sizes)}: expected at most one size of -1")
        if self.fsdp_min_weight_size < 0:
            raise ValueError(
                f"mesh.fsdp_min_weight_size={self.fsdp_min_weight_size}: it must not be negative"
            )
        for name in ("fsdp_gather_dtype", "fsdp_scatter_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"mesh.{name}={getattr(self, name)!r} is unknown; expected one of"
                    f" {', '.join(DTYPES)}"
                )
        if self.num_microbatches < 1 and self.num_microbatches != -1:
            raise ValueError(
                f"mesh.num_microbatches={self.num_microbatches}: it must be at least 1, or -1 for"
                " the number of pipeline stages"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes, as given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def count_microbatches(self, num_stages: int) -> int:
        """Returns the number of micro-batches for a number of stages; 1 for a single stage."""
        if num_stages == 1:
            return 1
        return num_stages if self.num_microbatches == -1 else self.num_microbatches

    @property
    def gather_dtype(self) -> jnp.dtype:
        """Type in which weights are sent, as a JAX dtype."""
        return DTYPES[self.fsdp_gather_dtype]

    @property
    def scatter_dtype(self) -> jnp.dtype:
        """Type in which gradients are summed, as a JAX dtype."""
        return DTYPES[self.fsdp_scatter_dtype]


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a mesh with the axes `MESH_AXES`.

    Args:
        config: Sizes of the axes.
        devices: Devices of the mesh; None for all devices.

    Returns:
        A mesh in which neighbors in `devices`, or in the torus of TPUs, are neighbors along `tp`.

    Raises:
        ValueError: If the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes
    given = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), given)
    if remainder or rest == 0:
        raise ValueError(
            f"mesh {_describe(sizes)} needs a multiple of {given} devices; found {len(devices)}"
        )
    if -1 not in sizes.values() and rest != 1:
        raise ValueError(
            f"mesh {_describe(sizes)} uses only {given} of {len(devices)} devices;"
            " set one size to -1 to use all of them"
        )
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types, devices=devices)


def axis_size(axis_names: str | Sequence[str]) -> int:
    """Returns the number of devices along mesh axes; 1 outside of a `shard_map` over them."""
    return math.prod(lax.axis_size(name) for name in bound_axes(axis_names))


def axis_index(axis_names: str | Sequence[str]) -> jax.Array | int:
    """Returns this device's index along mesh axes in row-major order; 0 outside of `shard_map`."""
    axes = bound_axes(axis_names)
    return lax.axis_index(axes) if axes else 0


def bound_axes(axis_names: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the mesh axes that are manual, that is, bound by an enclosing `shard_map`."""
    names = (axis_names,) if isinstance(axis_names, str) else axis_names
    return tuple(name for name in names if _is_bound(name))


def _is_bound(axis_name: str) -> bool:
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def match_varying_axes(tree: PyTree, axis_names: Sequence[str] = ()) -> PyTree:
    """Marks all arrays of a tree as varying over the mesh axes that any of them varies over.

    With `check_vma` of `shard_map`, the default, the carry of a scan must vary over the same axes
    before and after a step, and gradients must vary like their arguments. Without, and outside of
    `shard_map`, the function does nothing.

    Args:
        tree: Tree of arrays.
        axis_names: Additional axes over which the arrays shall vary.

    Returns:
        The marked tree.
    """
    axes = varying_axes(tree).union(axis_names)

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """Returns the mesh axes of a `shard_map` that the arrays, or shapes, of a tree vary over."""
    types = [
        jax.typeof(x) if isinstance(x, jax.Array) else x
        for x in jax.tree.leaves(tree)
        if isinstance(x, (jax.Array, jax.ShapeDtypeStruct))
    ]
    # A shape created outside of `shard_map` has no mark.
    marks = [getattr(t, "vma", None) or getattr(t, "manual_axis_type", None) for t in types]
    return frozenset().union(*(getattr(mark, "varying", mark) for mark in marks if mark))
