"""Batches on the mesh: whether model and data divide over it, and which rows a process reads."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from xlstm.dataset.batch import Batch
from xlstm.dataset.data import Data
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.mesh import BATCH_AXES, TOKEN_AXES, create_mesh
from xlstm.files import write_atomically
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.train_step import BATCH_SPEC
from xlstm.trainer.llm.config import RunConfig


def _check_batch_sizes(config: RunConfig, mesh: Mesh) -> None:
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    minibatches = config.trainer.num_minibatches
    microbatches = config.mesh.count_microbatches(mesh.shape["pp"])
    of_microbatches = f", of {microbatches} micro-batches (mesh.num_microbatches) each"
    parts = shards * minibatches * microbatches
    ramp = [("ramp_batch_sizes", size) for size in config.data.ramp_batch_sizes]
    for name, size in [("batch_size", config.data.batch_size), *ramp]:
        if size % parts:
            raise ValueError(
                f"data.{name}={size} does not divide into {shards} shards"
                f" ({' x '.join(f'mesh.{axis}' for axis in BATCH_AXES)}) of {minibatches}"
                f" minibatches (trainer.num_minibatches)"
                f"{of_microbatches if microbatches > 1 else ''}: expected a multiple of {parts}"
            )


def _check_context_length(config: RunConfig, mesh: Mesh) -> None:
    length, model, parts = config.data.context_length, config.model, mesh.shape["cp"]
    _check_divides("data.context_length", length, ("pp", "cp", "tp"), mesh)
    needed, others = model.conv_width - 1, mesh.shape["pp"] * mesh.shape["tp"]
    if parts > 1 and "xlstm_2024" in model.pattern.counts and length // parts < needed:
        shortest = -(-needed // others) * others * parts
        fewer = (n for n in range(2, parts) if length % (n * others) == 0 and length // n >= needed)
        raise ValueError(
            f"data.context_length={length} over mesh.cp={parts} leaves parts of {length // parts}"
            f" tokens, but the convolution of width {model.conv_width} (model.conv_width) needs"
            f" {needed}: expected a data.context_length of at least {shortest}, or a mesh.cp of at"
            f" most {max(fewer, default=1)}"
        )


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError if a model does not divide over a mesh."""
    pattern, stages = model.pattern, mesh.shape["pp"]
    if not pattern.is_uniform and pattern.repeats % stages:
        raise ValueError(
            f"mesh.pp={stages} stages cannot hold the same blocks: the pattern of"
            f" {pattern.length()} mLSTM and sLSTM blocks repeats {pattern.repeats} times"
            f" (model.num_blocks={model.num_blocks}), which is not a multiple of {stages}"
        )
    sizes = [
        ("model.num_blocks", model.num_blocks, ("pp",)),
        ("model.num_heads", model.num_heads, ("tp",)),
        ("the hidden size of feed-forward layers, model.ffn_dim", model.ffn_dim, ("tp",)),
        (
            "the hidden size of feed-forward layers in sLSTM blocks, model.slstm_ffn_dim",
            model.slstm_ffn_dim,
            ("tp",),
        ),
        ("model.vocab_size", model.vocab_size, ("pp", "tp")),
    ]
    if "slstm" in pattern.counts:
        name = "the number of heads in sLSTM blocks, model.num_heads"
        sizes.append((name, model.num_heads, TOKEN_AXES))
    for name, size, axes in sizes:
        _check_divides(name, size, axes, mesh)


def _check_divides(name: str, size: int, axes: Sequence[str], mesh: Mesh) -> None:
    sizes = {f"mesh.{axis}": mesh.shape[axis] for axis in axes}
    parts = math.prod(sizes.values())
    if size % parts:
        raise ValueError(
            f"{name}={size} does not divide over"
            f" {' x '.join(f'{axis}={value}' for axis, value in sizes.items())}: expected a"
            f" multiple of {parts}"
        )


def create_run_mesh(config: RunConfig) -> Mesh:
    """Creates the mesh of a run; raises ValueError if the model or the batch does not fit on it."""
    mesh = create_mesh(config.mesh)
    check_model(config.model, mesh)
    if mesh.shape["cp"] > 1 and config.backend.name != "fwbw":
        raise ValueError(
            f"mesh.cp={mesh.shape['cp']} does not work with backend.name={config.backend.name}:"
            " expected backend.name=fwbw, or mesh.cp=1"
        )
    _check_context_length(config, mesh)
    _check_batch_sizes(config, mesh)
    return mesh


def process_shard(mesh: Mesh) -> dict[str, int]:
    """Returns the shard of every global batch that this process reads: the rows of its devices.

    Processes read the same rows if their devices have the same positions along the batch axes, as
    when the `tp` or `pp` axis spans several processes.

    Args:
        mesh: The mesh.

    Returns:
        `shard_index` and `shard_count`, for the batches of `xlstm.dataset`.

    Raises:
        ValueError: If the rows of this process are not one of several equal shards of the batch.
    """
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(num_shards, -1)
    (positions,) = np.nonzero((owners == jax.process_index()).any(axis=1))
    first, size = int(positions[0]), len(positions)
    if positions[-1] - first + 1 != size or first % size or num_shards % size:
        raise ValueError(
            f"the devices of process {jax.process_index()} have the positions"
            f" {positions.tolist()} of {num_shards} along"
            f" {' x '.join(f'mesh.{axis}' for axis in BATCH_AXES)}, which are not one of several"
            " equal shards: choose mesh sizes that divide the number of devices of a process, or"
            " are multiples of it"
        )
    return {"shard_index": first // size, "shard_count": num_shards // size}


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the data has more token ids than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} of the data has {tokenizer.vocab_size} token ids, but"
            f" the model only model.vocab_size={config.model.vocab_size}"
        )


def global_batches(local_batches: Iterable[Batch], mesh: Mesh) -> Iterator[Batch]:
    """Makes global batches: puts the rows of each process on its devices.

    Args:
        local_batches: The process shard of every global batch, see `process_shard`.
        mesh: The mesh.

    Yields:
        The batches, as arrays that are sharded over the batch axes.
    """
    sharding, num_shards = NamedSharding(mesh, BATCH_SPEC), process_shard(mesh)["shard_count"]

    for batch in local_batches:
        shapes = jax.tree.map(lambda rows: (num_shards * len(rows), *rows.shape[1:]), batch)
        yield jax.make_array_from_process_local_data(sharding, batch, shapes)


def dump_batch(data: Data, directory: str, step: int) -> str:
    """Writes the global batch of a step, and where its rows come from.

    Args:
        data: Training data of the run.
        directory: Folder for `step_<step>.npz`, the arrays of the batch, and `step_<step>.json`,
            the store and the documents of each row.
        step: The step, counted from 1.

    Returns:
        A clause for messages that names the documents and the file.
    """
    origins = data.batch_origins(step - 1)
    path = os.path.join(directory, f"step_{step}")
    if jax.process_index() == 0:
        batch = next(iter(data.train_batches(start_step=step - 1)))
        arrays = io.BytesIO()
        fields = {name: array for name, array in vars(batch).items() if array is not None}
        np.savez_compressed(arrays, **fields)
        os.makedirs(directory, exist_ok=True)
        write_atomically(f"{path}.npz", arrays.getvalue())
        rows = [dataclasses.asdict(origin) for origin in origins]
        write_atomically(f"{path}.json", json.dumps(rows, indent=1) + "\n")
    documents: dict[str, list[str]] = {}
    for origin in origins:
        first, last = origin.first_document, origin.last_document
        documents.setdefault(origin.store, []).append(
            str(first) if first == last else f"{first}-{last}"
        )
    named = "; ".join(
        f"documents {', '.join(numbers)} of {store}" for store, numbers in documents.items()
    )
    return f"its batch ({named}) is in {path}.npz"
