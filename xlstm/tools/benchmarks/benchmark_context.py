"""Times context parallelism side by side with what it replaces.

    bazel run //xlstm/tools:benchmark_context -- --simulate_devices=8 \
        --config.data.context_length=1024 --config.data.batch_size=8

All candidates are compiled first and then run in turn, so that a drift of the machine's speed
affects them equally. The first two are the mLSTM of a block, forward and backward, on one device:
`fwbw` alone, and as a part of a sequence on a mesh axis of size 1. The others are training steps of
the config on all devices: with `mesh.fsdp`, and with `mesh.cp`, at the same number of tokens.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec as P
from rich.table import Table

from xlstm.distributed.mesh import MESH_AXES, MeshConfig, create_mesh
from xlstm.files import write_atomically
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import create_backend
from xlstm.tools.benchmarks.train_step import random_batch
from xlstm.tools.command_line import output_path, print_table, run
from xlstm.tools.config import define_config_flags, run_config
from xlstm.tools.processes import initialize_devices
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh, global_batches
from xlstm.trainer.llm.language_model import create_training

_REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Number of timed runs of each candidate.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as an object.")


def _mlstm(config: RunConfig, context_axis: str | None) -> Callable[[], Any]:
    """Returns a call of forward and backward pass of the mLSTM in a block, on one device."""
    model, data = config.model, config.data
    mesh = create_mesh(MeshConfig(dp=1), jax.devices()[:1])
    leading = data.batch_size, model.num_heads, data.context_length
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*leading, *shape)), model.compute_dtype)

    qk_dim, v_dim = model.qk_dim // model.num_heads, model.v_dim // model.num_heads
    inputs = normal(qk_dim), normal(qk_dim), normal(v_dim), normal(), normal() + 3
    backend = create_backend(config.backend, model, context_axis)
    gradient = jax.grad(lambda *inputs: jnp.sum(backend.apply({}, *inputs) ** 2), range(5))
    step = jax.shard_map(gradient, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    compiled = jax.jit(step).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def _train_step(config: RunConfig, axis: str) -> Callable[[], Any]:
    """Returns a call of the training step with all devices on one mesh axis."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {axis: -1}
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    mesh = create_run_mesh(config)
    state, _, train_step = create_training(config, mesh)
    (batch,) = global_batches([random_batch(config)], mesh)
    compiled = train_step.lower(state, batch).compile()

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return call


def measure(config: RunConfig, repeats: int) -> dict[str, dict[str, float]]:
    """Times all candidates.

    Args:
        config: Model, backend, batch and optimizer; the mesh is replaced.
        repeats: Number of timed runs of each.

    Returns:
        For each candidate its median time in milliseconds, and, for every second one, the median
        of the ratios to the runs of the one before.

    Raises:
        ValueError: If the batch or the context length does not divide over the devices.
    """
    candidates = {
        "mLSTM": _mlstm(config, None),
        "mLSTM, cp=1": _mlstm(config, "cp"),
        "step, fsdp": _train_step(config, "fsdp"),
        "step, cp": _train_step(config, "cp"),
    }
    times = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, call in candidates.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if number:  # The first run warms up.
                times[name].append(time.perf_counter() - begin)
    rows = {name: {"median_ms": 1e3 * float(np.median(runs))} for name, runs in times.items()}
    for base, name in (("mLSTM", "mLSTM, cp=1"), ("step, fsdp", "step, cp")):
        rows[name]["ratio"] = float(np.median(np.divide(times[name], times[base])))
    return rows


def main(argv: list[str]) -> None:
    """Times the candidates as the flags say, and prints a table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    json_path, config = output_path("json", _JSON.value), run_config()
    initialize_devices()
    rows = measure(config, _REPEATS.value)
    table = Table(
        title=f"B {config.data.batch_size}, T {config.data.context_length},"
        f" D {config.model.embedding_dim}; {len(jax.devices())} devices"
    )
    for column in ("", "median", "ratio to the row above"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        table.add_row(name, f"{row['median_ms']:.2f} ms", ratio)
    print_table(table)
    if json_path:
        write_atomically(json_path, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run(main, define_config_flags)
