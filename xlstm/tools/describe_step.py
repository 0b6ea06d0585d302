"""Says what a training step needs and sends on a mesh, without running it.

    bazel run //xlstm/tools:describe_step -- --config=xlstm:1.4B --config.mesh.fsdp=8 \
        --simulate_devices=8

The step is compiled, for as many devices as there are or are simulated; no parameters are made. So
a laptop can say whether a model fits on a cluster, and what a mesh costs. Figures are of one
device.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from xlstm.common_types import PyTree, TrainState
from xlstm.dataset.batch import Batch
from xlstm.distributed.hlo_collectives import Collective, find_collectives
from xlstm.distributed.pipeline_parallel import bubble_fraction
from xlstm.tools.command_line import run
from xlstm.tools.config import define_config_flags, run_config
from xlstm.tools.processes import initialize_devices
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.base.train_step import BATCH_SPEC
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh
from xlstm.trainer.llm.expected_collectives import ExpectedCollective, expected_collectives
from xlstm.trainer.llm.language_model import create_training

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class StepDescription:
    """What a compiled training step needs and sends.

    Attributes:
        memory: Bytes on one device, by what they hold.
        collectives: What it sends.
        expected: What it should send.
    """

    memory: dict[str, int]
    collectives: list[Collective]
    expected: list[ExpectedCollective]


def describe_step(config: RunConfig, mesh: Mesh) -> StepDescription:
    """Compiles the training step of a configuration, and reads off what it needs and sends.

    Args:
        config: The run's configuration.
        mesh: Its mesh.

    Returns:
        The description.
    """
    state, batch, lowered = lower_step(config, mesh)
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    parameters, batch_size = _bytes_here(unboxed(state.params)), _bytes_here(batch)
    memory = {
        "parameters": parameters,
        "optimizer state": analysis.argument_size_in_bytes - parameters - batch_size,
        "batch": batch_size,
        "temporary": analysis.temp_size_in_bytes,
    }
    collectives = find_collectives(compiled.as_text(), mesh)
    return StepDescription(memory, collectives, expected_collectives(config, mesh, state.params))


def lower_step(config: RunConfig, mesh: Mesh) -> tuple[TrainState, Batch, jax.stages.Lowered]:
    """Traces the training step of a configuration; nothing is made but the program.

    Args:
        config: The run's configuration.
        mesh: Its mesh.

    Returns:
        Shapes and places of the train state and of a batch, and the step that takes them, not yet
        compiled.
    """
    state, _, train_step = create_training(config, mesh, abstract=True)
    batch = _abstract_batch(config, mesh)
    return state, batch, train_step.lower(state, batch)


def _abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    shape = (config.data.batch_size, config.data.context_length)
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def tokens(dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(
        inputs=tokens(jnp.int32),
        targets=tokens(jnp.int32),
        targets_mask=tokens(bool),
        reset=tokens(bool),
    )


def _bytes_here(tree: PyTree) -> int:
    """The size of one device's part."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(num_bytes: int) -> str:
    """A size in the unit that leaves up to three digits before the point."""
    unit = next(unit for unit in _UNITS if num_bytes < 999.95 * _UNITS[unit] or unit == "GiB")
    return f"{num_bytes / _UNITS[unit]:,.1f} {unit}"


def _memory_table(memory: dict[str, int]) -> Table:
    table = Table(title="memory of one device", box=box.SIMPLE)
    table.add_column("what")
    table.add_column("size", justify="right")
    for name, num_bytes in memory.items():
        table.add_row(name, _size(num_bytes))
    table.add_row("together", _size(sum(memory.values())))
    return table


def _traffic_table(description: StepDescription, mesh: Mesh) -> Table:
    found, expected = {}, {}
    for collective in description.collectives:
        found.setdefault((collective.axes, collective.kind), []).append(collective)
    for traffic in description.expected:
        expected.setdefault((traffic.axes, traffic.kind), []).append(traffic)
    table = Table(
        title="what a step sends",
        caption="Expected are all but the numbers for metrics and norms.",
        box=box.SIMPLE,
    )
    for name in ("axes", "kind", "count", "expected", "size", "expected", "what"):
        justify = "left" if name in ("axes", "kind", "what") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "what")

    def place(key: tuple[tuple[str, ...], str]) -> tuple:
        return [mesh.axis_names.index(axis) for axis in key[0]], key[1]

    for axes, kind in sorted(found.keys() | expected.keys(), key=place):
        collectives, traffic = (rows.get((axes, kind), []) for rows in (found, expected))
        table.add_row(
            " ".join(axes),
            kind,
            f"{sum(c.count for c in collectives):,}",
            f"{sum(t.count for t in traffic):,}",
            _size(sum(c.count * c.num_bytes for c in collectives)),
            _size(sum(t.num_bytes for t in traffic)),
            ", ".join(dict.fromkeys(t.purpose for t in traffic)),
        )
    return table


def main(argv: list[str]) -> None:
    """Compiles the step of the config and prints the tables."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config()
    initialize_devices()
    mesh = create_run_mesh(config)
    description = describe_step(config, mesh)
    console = Console()
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    console.print(f"mesh: {sizes}", highlight=False)
    stages = mesh.shape["pp"]
    if stages > 1:
        bubble = bubble_fraction(stages, config.mesh.count_microbatches(stages))
        console.print(f"pipeline bubble: {bubble:.0%} of the time of the blocks", highlight=False)
    console.print(_memory_table(description.memory))
    console.print(_traffic_table(description, mesh))


if __name__ == "__main__":
    run(main, define_config_flags)
