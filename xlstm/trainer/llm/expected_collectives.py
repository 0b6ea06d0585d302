"""The collectives that a training step should execute, derived from its configuration.

`xlstm.distributed.hlo_collectives` finds the actual ones in a compiled step.
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
from xlstm.distributed.mesh import BATCH_AXES, TOKEN_AXES, VOCAB_AXES
from xlstm.trainer.base.param_utils import is_partitioned
from xlstm.trainer.llm.config import RunConfig

_KEY_BYTES, _FLOAT_BYTES = 8, 4


@dataclasses.dataclass(frozen=True)
class ExpectedCollective:
    """Collectives of a step with one kind and one purpose.

    Attributes:
        kind: XLA operation, such as `all-gather`.
        axes: Mesh axes along which devices communicate.
        count: Number of executions in a step.
        num_bytes: Total size, over all executions, of the complete arrays that a group of devices
            gathers, sums or permutes.
        purpose: Data that is sent.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    num_bytes: int
    purpose: str


def expected_collectives(config: RunConfig, mesh: Mesh, params: PyTree) -> list[ExpectedCollective]:
    """Returns the collectives that a training step should execute.

    The sums for metrics and norms, a few bytes per parameter and step, are not included.

    Args:
        config: Configuration of the run.
        mesh: Mesh of the run.
        params: Parameters of the train state, possibly abstract.

    Returns:
        The collectives along mesh axes with more than one device.
    """
    counted = [
        *_tensor_collectives(config, mesh),
        *_context_collectives(config, mesh),
        *_vocabulary_collectives(config, mesh),
        *_pipeline_collectives(config, mesh),
        *_parameter_collectives(config, mesh, params),
        *_gradient_collectives(mesh, params),
    ]
    found = []
    for collective in counted:
        axes = tuple(axis for axis in collective.axes if mesh.shape[axis] > 1)
        if axes and collective.count:
            found.append(dataclasses.replace(collective, axes=axes))
    return found


@dataclasses.dataclass(frozen=True)
class _Work:
    """Numbers of executions in a step, and of tokens in each."""

    minibatches: int
    ticks: int  # Executions of a stage for each minibatch.
    stages: int
    tokens: int  # Tokens of a minibatch on one device of the batch axes and `cp`.
    tokens_per_tick: int
    rows_per_tick: int
    embedding_bytes: int  # Bytes of the vector of a token.

    def block_executions(self, num_blocks: int) -> int:
        """Returns how many blocks a device executes in a step, of `num_blocks` in all stages."""
        return self.minibatches * self.ticks * num_blocks // self.stages


def _work(config: RunConfig, mesh: Mesh) -> _Work:
    stages = mesh.shape["pp"]
    microbatches = config.mesh.count_microbatches(stages)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    minibatches = config.trainer.num_minibatches
    rows = config.data.batch_size // (shards * minibatches)
    tokens = rows * config.data.context_length // mesh.shape["cp"]
    return _Work(
        minibatches=minibatches,
        ticks=microbatches + stages - 1,
        stages=stages,
        tokens=tokens,
        tokens_per_tick=tokens // microbatches,
        rows_per_tick=rows // microbatches,
        embedding_bytes=config.model.embedding_dim * np.dtype(config.model.compute_dtype).itemsize,
    )


def _tensor_collectives(config: RunConfig, mesh: Mesh) -> Iterator[ExpectedCollective]:
    """Yields the gathers and scatters of tokens between the layers, and their transposes."""
    work = _work(config, mesh)
    for kind, count in config.model.pattern.counts.items():
        yield from _layer_collectives(
            config, mesh, _GATHERING_LAYERS[kind], work.block_executions(count)
        )
        if kind == "xlstm_2024":
            yield from _gate_collectives(config, work, work.block_executions(count))
        if kind == "slstm":
            yield from _exchange_collectives(config, mesh, work.block_executions(count))
    for kind in ("all-gather", "reduce-scatter"):
        count = 2 * work.minibatches  # One forward, and the transpose of the other kind backward.
        num_bytes = count * work.tokens * work.embedding_bytes
        yield ExpectedCollective(kind, ("tp",), count, num_bytes, "tokens of embedding, head")


# Layers of a block that gather the tokens and scatter sums, by the block's kind.
_GATHERING_LAYERS = {"xlstm_7b": 2, "xlstm_2024": 1, "slstm": 1}


def _layer_collectives(
    config: RunConfig, mesh: Mesh, layers: int, executions: int
) -> Iterator[ExpectedCollective]:
    """Yields the gathers and scatters of a block's layers, for its given executions."""
    work, size = _work(config, mesh), mesh.shape["tp"]
    num_bytes = work.tokens_per_tick * work.embedding_bytes
    # A backward pass that recomputes the block gathers its inputs again. If nothing was kept, it
    # also scatters again, except for the output of the last layer.
    gathers = (2 if config.model.remat == "none" else 3) * layers
    scatters = 2 * layers + (layers - 1 if config.model.remat == "block" else 0)
    if config.mesh.tp_overlap:
        # A ring of `size - 1` steps, each with a part of the tokens, also for the transposes.
        count = executions * (gathers + scatters) * (size - 1)
        purpose = "tokens of layers"
        yield ExpectedCollective(
            "collective-permute", ("tp",), count, count * num_bytes // size, purpose
        )
        return
    for kind, each in (("all-gather", gathers), ("reduce-scatter", scatters)):
        count = executions * each
        yield ExpectedCollective(kind, ("tp",), count, count * num_bytes, "tokens of layers")


def _exchange_collectives(
    config: RunConfig, mesh: Mesh, executions: int
) -> Iterator[ExpectedCollective]:
    """Yields the exchanges of tokens for channels and back in sLSTM layers, and the transposes."""
    work = _work(config, mesh)
    repeated = {"none": 0, "dots": 1, "block": 2}[config.model.remat]
    count = executions * (4 + repeated)
    num_bytes = count * work.tokens_per_tick * work.embedding_bytes // mesh.shape["tp"]
    yield ExpectedCollective("all-to-all", TOKEN_AXES, count, num_bytes, "tokens of sLSTM layers")
    # Resets do not change between blocks, so XLA moves the gather out of their loop.
    count = work.minibatches * work.ticks + (executions if config.model.remat == "block" else 0)
    num_bytes = count * work.tokens_per_tick * mesh.shape["cp"]
    yield ExpectedCollective("all-gather", ("cp",), count, num_bytes, "resets of sLSTM layers")


def _gate_collectives(
    config: RunConfig, work: _Work, executions: int
) -> Iterator[ExpectedCollective]:
    """Yields the sums of gates that depend on all heads, two per block, and their transposes."""
    num_bytes = work.tokens_per_tick * config.model.num_heads * _FLOAT_BYTES
    sums = 4 if config.model.remat == "block" else 2
    for kind, each in (("reduce-scatter", sums), ("all-gather", 2)):
        count = executions * each
        yield ExpectedCollective(kind, ("tp",), count, count * num_bytes, "gates")


def _context_collectives(config: RunConfig, mesh: Mesh) -> Iterator[ExpectedCollective]:
    """Yields what the parts of a sequence send to later ones, and the gradients to earlier ones."""
    parts, model, work = mesh.shape["cp"], config.model, _work(config, mesh)
    if parts == 1:
        return
    messages = 1 + math.ceil(math.log2(parts - 1))  # See `combine_earlier`.
    heads = work.rows_per_tick * model.num_heads // mesh.shape["tp"]
    qk_dim, v_dim = model.qk_dim // model.num_heads, model.v_dim // model.num_heads
    state = qk_dim * v_dim + qk_dim  # C and n.
    # A backward pass that recomputes the block from its inputs alone sends again.
    repeated = 2 if model.remat == "block" else 1
    inputs = work.rows_per_tick * (model.conv_width - 1) * model.inner_dim // mesh.shape["tp"]
    inputs_bytes = (1 + repeated) * inputs * np.dtype(model.compute_dtype).itemsize
    for kind, count in model.pattern.counts.items():
        executions = work.block_executions(count)
        if kind in ("xlstm_7b", "xlstm_2024"):
            # With the state, its decay and scale; with its gradient, the decay alone.
            numbers = repeated * (state + 2) + state + 1
            yield ExpectedCollective(
                "collective-permute",
                ("cp",),
                executions * messages * (1 + repeated),
                executions * messages * heads * numbers * _FLOAT_BYTES,
                "states of mLSTM layers",
            )
        if kind == "xlstm_2024":
            yield ExpectedCollective(
                "collective-permute",
                ("cp",),
                executions * (1 + repeated),
                executions * inputs_bytes,
                "inputs of convolutions",
            )


def _vocabulary_collectives(config: RunConfig, mesh: Mesh) -> Iterator[ExpectedCollective]:
    """Yields three numbers per token for the loss, and the tokens that stages share over `pp`."""
    work = _work(config, mesh)
    numbers = work.minibatches * work.tokens * _FLOAT_BYTES
    purpose = "loss"
    yield ExpectedCollective("all-reduce", VOCAB_AXES, work.minibatches, numbers, purpose)
    yield ExpectedCollective("reduce-scatter", VOCAB_AXES, work.minibatches, 2 * numbers, purpose)
    yield ExpectedCollective("all-gather", VOCAB_AXES, work.minibatches, 2 * numbers, purpose)
    count = 4 * work.minibatches  # Embedding and head, forward and transposed.
    num_bytes = count * work.tokens * work.embedding_bytes // mesh.shape["tp"]
    yield ExpectedCollective("all-reduce", ("pp",), count, num_bytes, "tokens of embedding, head")


def _pipeline_collectives(config: RunConfig, mesh: Mesh) -> Iterator[ExpectedCollective]:
    """Yields what stages send at every tick: a micro-batch, and its gradient back."""
    work, size = _work(config, mesh), mesh.shape["tp"]
    ticks = work.minibatches * work.ticks
    vectors = work.tokens_per_tick * work.embedding_bytes // size
    num_bytes = 2 * ticks * vectors
    yield ExpectedCollective("collective-permute", ("pp",), 2 * ticks, num_bytes, "micro-batches")
    resets = ticks * work.tokens_per_tick
    yield ExpectedCollective("collective-permute", ("pp",), ticks, resets, "resets")
    if config.model.dropout:
        keys = ticks * work.tokens_per_tick // size * _KEY_BYTES
        yield ExpectedCollective("collective-permute", ("pp",), ticks, keys, "dropout keys")


def _boxes(params: PyTree) -> list[tuple[str, nn.Partitioned]]:
    """Returns the boxes with the name of their part of the model."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_partitioned)
    return [(path[0].key, box) for path, box in leaves]


def _parameter_collectives(
    config: RunConfig, mesh: Mesh, params: PyTree
) -> Iterator[ExpectedCollective]:
    """Yields the gathers of sharded weights, and the scatters of their gradients."""
    work = _work(config, mesh)
    gather_size = np.dtype(config.mesh.gather_dtype).itemsize
    scatter_size = np.dtype(config.mesh.scatter_dtype).itemsize
    gathers_per_use = 1 if config.model.remat == "none" else 2
    for part, box in _boxes(params):
        sharded = axes_of(box.names)
        if "fsdp" not in sharded:
            continue
        held = box.value.size // math.prod(mesh.shape[axis] for axis in sharded if axis != "fsdp")
        # Weights do not change between minibatches, so XLA moves the gather out of their loop.
        gathers, gathered = 1, held
        scatters, scattered = work.minibatches, work.minibatches * held
        if part == "blocks" and mesh.shape["pp"] == 1:
            # Gathered block by block, and again in the backward pass.
            scatters = work.block_executions(box.value.shape[0])
            gathers, gathered = gathers_per_use * scatters, gathers_per_use * scattered
        purpose = "weights"
        yield ExpectedCollective("all-gather", ("fsdp",), gathers, gathered * gather_size, purpose)
        yield ExpectedCollective(
            "reduce-scatter", ("fsdp",), scatters, scattered * scatter_size, purpose
        )


def _gradient_collectives(mesh: Mesh, params: PyTree) -> Iterator[ExpectedCollective]:
    """Yields the sums of the gradients of replicated parameters, one per step and set of axes."""
    sums = {}
    for _, box in _boxes(params):
        sharded = axes_of(box.names)
        axes = tuple(
            axis for axis in mesh.axis_names if axis not in sharded and mesh.shape[axis] > 1
        )
        held = box.value.size // math.prod(mesh.shape[axis] for axis in sharded)
        sums[axes] = sums.get(axes, 0) + held * _FLOAT_BYTES
    for axes, num_bytes in sums.items():
        yield ExpectedCollective("all-reduce", axes, 1, num_bytes, "gradients")
