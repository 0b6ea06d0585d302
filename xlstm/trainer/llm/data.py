"""Brings batches from the token stores to the mesh."""

from collections.abc import Iterable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from xlstm.dataset.batch import Batch
from xlstm.dataset.token_store import TOKENS_FILE, TokenStore
from xlstm.distributed.mesh import BATCH_AXES, create_mesh
from xlstm.trainer.base.train_step import BATCH_SPEC
from xlstm.trainer.llm.config import RunConfig


def check_batch_size(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError if the batch does not divide over the mesh and the minibatches."""
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh.shape[axis]
    minibatches = config.trainer.num_minibatches
    if config.data.batch_size % (shards * minibatches):
        raise ValueError(
            f"data.batch_size={config.data.batch_size} does not divide into {shards} shares"
            f" ({' x '.join(f'mesh.{axis}' for axis in BATCH_AXES)}) of {minibatches} minibatches"
            f" (trainer.num_minibatches): a multiple of {shards * minibatches} would"
        )


def check_mesh(config: RunConfig) -> None:
    """Raises ValueError if the mesh uses more than the training step supports: data parallelism."""
    for axis in ("fsdp", "pp", "tp"):
        size = getattr(config.mesh, axis)
        if size != 1 and jax.device_count() % size == 0:
            raise ValueError(
                f"mesh.{axis}={size}: training does not support this axis yet; use mesh.dp"
            )


def create_run_mesh(config: RunConfig) -> Mesh:
    """Creates the mesh of a run; raises ValueError if training or the batch does not fit on it."""
    check_mesh(config)
    mesh = create_mesh(config.mesh)
    check_batch_size(config, mesh)
    return mesh


def check_vocabulary(config: RunConfig, stores: Iterable[TokenStore]) -> None:
    """Raises ValueError if a store has more token ids than the model."""
    for store in stores:
        if store.meta.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"the token store {store.path} has {store.meta.vocab_size} token ids, the model"
                f" only model.vocab_size={config.model.vocab_size}"
            )


def corpus_checksums(stores: Iterable[TokenStore]) -> list[str]:
    """The checksum of each store's tokens, by which a run knows its data again."""
    return [store.meta.files[TOKENS_FILE]["sha256"] for store in stores]


def global_batches(local_batches: Iterable[Batch], mesh: Mesh) -> Iterator[Batch]:
    """Places each process's rows on its devices, as its part of a global batch."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    for batch in local_batches:
        yield jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
        )
