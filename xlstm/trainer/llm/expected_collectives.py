"""What a training step should send, counted from the configuration alone.

`xlstm.distributed.communication` reads off a compiled step what it does send.
"""

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from xlstm.common_types import PyTree
from xlstm.distributed.data_parallel import axes_of
from xlstm.distributed.mesh import BATCH_AXES, VOCAB_AXES
from xlstm.trainer.base.param_utils import is_partitioned
from xlstm.trainer.llm.config import RunConfig

_KEY_BYTES, _FLOAT_BYTES = 8, 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, for one purpose, of a step.

    Attributes:
        kind: The XLA operation, such as `all-gather`.
        axes: The mesh axes along which devices exchange something.
        count: How often it is executed in a step.
        num_bytes: Size, in all executions together, of the whole arrays that a group of devices
            brings together, sums or hands on.
        purpose: What is sent.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    num_bytes: int
    purpose: str


def expected_traffic(config: RunConfig, mesh: Mesh, params: PyTree) -> list[Traffic]:
    """Counts what a training step has to send.

    Not counted are the numbers for metrics and norms, a few bytes a parameter, once a step.

    Args:
        config: The run's configuration.
        mesh: Its mesh.
        params: Parameters of the train state; abstract ones do.

    Returns:
        The traffic along mesh axes of more than one device.
    """
    counted = [
        *_tensor_traffic(config, mesh),
        *_vocabulary_traffic(config, mesh),
        *_pipeline_traffic(config, mesh),
        *_parameter_traffic(config, mesh, params),
        *_gradient_traffic(mesh, params),
    ]
    found = []
    for traffic in counted:
        axes = tuple(axis for axis in traffic.axes if mesh.shape[axis] > 1)
        if axes and traffic.count:
            found.append(dataclasses.replace(traffic, axes=axes))
    return found


@dataclasses.dataclass(frozen=True)
class _Work:
    """How a step's work is cut: what is computed how often on how much."""

    minibatches: int
    ticks: int  # Runs of a stage for each minibatch.
    stages: int
    tokens: int  # Of a minibatch, on one device of the batch axes.
    tokens_per_tick: int
    embedding_bytes: int  # Of one token's vector.

    def block_runs(self, num_blocks: int) -> int:
        """How often a device runs its blocks, of so many in all stages."""
        return self.minibatches * self.ticks * num_blocks // self.stages


def _work(config: RunConfig, mesh: Mesh) -> _Work:
    stages = mesh.shape["pp"]
    microbatches = config.mesh.count_microbatches(stages)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    minibatches = config.trainer.num_minibatches
    tokens = config.data.batch_size * config.data.context_length // (shards * minibatches)
    return _Work(
        minibatches=minibatches,
        ticks=microbatches + stages - 1,
        stages=stages,
        tokens=tokens,
        tokens_per_tick=tokens // microbatches,
        embedding_bytes=config.model.embedding_dim * np.dtype(config.model.compute_dtype).itemsize,
    )


def _tensor_traffic(config: RunConfig, mesh: Mesh) -> Iterator[Traffic]:
    """Tokens between the layers: a gather and a scatter for each, and their transposes."""
    work = _work(config, mesh)
    for kind, count in config.model.pattern.counts.items():
        yield from _layer_traffic(config, mesh, _GATHERING_LAYERS[kind], work.block_runs(count))
        if kind == "xlstm_2024":
            yield from _gate_traffic(config, work, work.block_runs(count))
        if kind == "slstm":
            yield _exchange_traffic(config, mesh, work.block_runs(count))
    for kind in ("all-gather", "reduce-scatter"):
        count = 2 * work.minibatches  # One is forward, the other's transpose backward.
        num_bytes = count * work.tokens * work.embedding_bytes
        yield Traffic(kind, ("tp",), count, num_bytes, "tokens of embedding, head")


# Layers of a block that gather the tokens and scatter sums, by the block's kind.
_GATHERING_LAYERS = {"xlstm_7b": 2, "xlstm_2024": 1, "slstm": 1}


def _layer_traffic(config: RunConfig, mesh: Mesh, layers: int, runs: int) -> Iterator[Traffic]:
    """What layers that gather and scatter send in so many runs of their block."""
    work, size = _work(config, mesh), mesh.shape["tp"]
    num_bytes = work.tokens_per_tick * work.embedding_bytes
    # A backward pass that computes the block again gathers its inputs again; if nothing at all was
    # kept, it scatters again too, but for the last layer's output.
    gathers = (2 if config.model.remat == "none" else 3) * layers
    scatters = 2 * layers + (layers - 1 if config.model.remat == "block" else 0)
    if config.mesh.tp_overlap:
        # A ring of `size - 1` steps, each with a part of the tokens; a scatter's transpose is one.
        count = runs * (gathers + scatters) * (size - 1)
        purpose = "tokens of layers"
        yield Traffic("collective-permute", ("tp",), count, count * num_bytes // size, purpose)
        return
    for kind, each in (("all-gather", gathers), ("reduce-scatter", scatters)):
        count = runs * each
        yield Traffic(kind, ("tp",), count, count * num_bytes, "tokens of layers")


def _exchange_traffic(config: RunConfig, mesh: Mesh, runs: int) -> Traffic:
    """Tokens for channels and back in sLSTM layers, and the transposes."""
    work = _work(config, mesh)
    again = {"none": 0, "dots": 1, "block": 2}[config.model.remat]
    count = runs * (4 + again)
    num_bytes = count * work.tokens_per_tick * work.embedding_bytes // mesh.shape["tp"]
    return Traffic("all-to-all", ("tp",), count, num_bytes, "tokens of sLSTM layers")


def _gate_traffic(config: RunConfig, work: _Work, runs: int) -> Iterator[Traffic]:
    """Gates that see the channels of all heads: two sums a block, and their transposes."""
    num_bytes = work.tokens_per_tick * config.model.num_heads * _FLOAT_BYTES
    sums = 4 if config.model.remat == "block" else 2
    for kind, each in (("reduce-scatter", sums), ("all-gather", 2)):
        count = runs * each
        yield Traffic(kind, ("tp",), count, count * num_bytes, "gates")


def _vocabulary_traffic(config: RunConfig, mesh: Mesh) -> Iterator[Traffic]:
    """Three numbers a token for the loss; over `pp` what the stages share."""
    work = _work(config, mesh)
    numbers = work.minibatches * work.tokens * _FLOAT_BYTES
    purpose = "loss"
    yield Traffic("all-reduce", VOCAB_AXES, work.minibatches, numbers, purpose)
    yield Traffic("reduce-scatter", VOCAB_AXES, work.minibatches, 2 * numbers, purpose)
    yield Traffic("all-gather", VOCAB_AXES, work.minibatches, 2 * numbers, purpose)
    count = 4 * work.minibatches  # Each forward, and its transpose.
    num_bytes = count * work.tokens * work.embedding_bytes // mesh.shape["tp"]
    yield Traffic("all-reduce", ("pp",), count, num_bytes, "tokens of embedding, head")


def _pipeline_traffic(config: RunConfig, mesh: Mesh) -> Iterator[Traffic]:
    """A micro-batch from stage to stage at every tick, and its gradient back."""
    work, size = _work(config, mesh), mesh.shape["tp"]
    ticks = work.minibatches * work.ticks
    vectors = work.tokens_per_tick * work.embedding_bytes // size
    num_bytes = 2 * ticks * vectors
    yield Traffic("collective-permute", ("pp",), 2 * ticks, num_bytes, "micro-batches")
    resets = ticks * work.tokens_per_tick
    yield Traffic("collective-permute", ("pp",), ticks, resets, "resets")
    if config.model.dropout:
        keys = ticks * work.tokens_per_tick // size * _KEY_BYTES
        yield Traffic("collective-permute", ("pp",), ticks, keys, "dropout keys")


def _boxes(params: PyTree) -> list[tuple[str, nn.Partitioned]]:
    """The boxes, each with the part of the model that it is in."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_partitioned)
    return [(path[0].key, box) for path, box in leaves]


def _parameter_traffic(config: RunConfig, mesh: Mesh, params: PyTree) -> Iterator[Traffic]:
    """Sharded weights: gathered for use, their gradients scattered once for each minibatch."""
    work = _work(config, mesh)
    gather_size = np.dtype(config.mesh.gather_dtype).itemsize
    scatter_size = np.dtype(config.mesh.scatter_dtype).itemsize
    again = 1 if config.model.remat == "none" else 2
    for part, box in _boxes(params):
        cut = axes_of(box.names)
        if "fsdp" not in cut:
            continue
        held = box.value.size // math.prod(mesh.shape[axis] for axis in cut if axis != "fsdp")
        # Weights stay the same for all minibatches: XLA moves the gather out of their loop.
        gathers, gathered = 1, held
        scatters, scattered = work.minibatches, work.minibatches * held
        if part == "blocks" and mesh.shape["pp"] == 1:
            # Block by block, and again in the backward pass.
            scatters = work.block_runs(box.value.shape[0])
            gathers, gathered = again * scatters, again * scattered
        purpose = "weights"
        yield Traffic("all-gather", ("fsdp",), gathers, gathered * gather_size, purpose)
        yield Traffic("reduce-scatter", ("fsdp",), scatters, scattered * scatter_size, purpose)


def _gradient_traffic(mesh: Mesh, params: PyTree) -> Iterator[Traffic]:
    """Gradients of what is not cut, once a step; those of the same axes together."""
    sums = {}
    for _, box in _boxes(params):
        cut = axes_of(box.names)
        axes = tuple(axis for axis in mesh.axis_names if axis not in cut and mesh.shape[axis] > 1)
        held = box.value.size // math.prod(mesh.shape[axis] for axis in cut)
        sums[axes] = sums.get(axes, 0) + held * _FLOAT_BYTES
    for axes, num_bytes in sums.items():
        yield Traffic("all-reduce", axes, 1, num_bytes, "gradients")
