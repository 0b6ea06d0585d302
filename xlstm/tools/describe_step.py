"""Prints the memory and the communication of a training step on a mesh, without running it.

    bazel run //xlstm/tools:describe_step -- --config=xlstm:1.4B --config.mesh.fsdp=8 \
        --simulate_devices=8

The tool compiles the step for the devices that exist or are simulated, and allocates no parameters.
So a laptop can tell whether a model fits on a cluster, and what a mesh costs. All figures are for
one device. If they exceed the memory of an accelerator, the tool names the fields that lower them.
"""

import dataclasses
import math

from xlstm.tools.command_line import announce_start, print_line, print_table, run

if __name__ == "__main__":  # The other imports take seconds.
    announce_start("describe_step: loading JAX and the model code ...")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from xlstm.common_types import PyTree, TrainState
from xlstm.dataset.batch import Batch
from xlstm.distributed.hlo_collectives import Collective, find_collectives
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.distributed.pipeline_parallel import bubble_fraction
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import mlstm_line
from xlstm.tools.config import define_config_flags, run_config
from xlstm.tools.processes import initialize_devices
from xlstm.trainer.base.clock import Clock, report_waits
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.base.train_step import BATCH_SPEC
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh
from xlstm.trainer.llm.expected_collectives import ExpectedCollective, expected_collectives
from xlstm.trainer.llm.language_model import create_training
from xlstm.trainer.logger.terminal import mesh_line, unused_accelerator_line

_ACCELERATOR_BYTES = 80 * 10**9
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class StepDescription:
    """Memory and communication of a compiled training step.

    Attributes:
        memory: Bytes on one device, by what they hold.
        collectives: The collectives that it executes.
        expected: The collectives that the model needs.
    """

    memory: dict[str, int]
    collectives: list[Collective]
    expected: list[ExpectedCollective]


def describe_step(config: RunConfig, mesh: Mesh) -> StepDescription:
    """Compiles the training step of a configuration and describes it.

    Args:
        config: The run's configuration.
        mesh: The run's mesh.

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
    """Traces the training step of a configuration without allocating arrays.

    Args:
        config: The run's configuration.
        mesh: The run's mesh.

    Returns:
        Shapes and shardings of the train state and of a batch, and the step that takes them, not
        yet compiled.
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
    """Returns the bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(num_bytes: int) -> str:
    """Returns a size in the unit that leaves up to three digits before the point."""
    unit = next(unit for unit in _UNITS if num_bytes < 999.95 * _UNITS[unit] or unit == "GiB")
    return f"{num_bytes / _UNITS[unit]:,.1f} {unit}"


def memory_advice(config: RunConfig, mesh: Mesh, memory: dict[str, int]) -> str:
    """Returns which fields lower the memory of a step that exceeds an accelerator's memory.

    Args:
        config: The run's configuration.
        mesh: The run's mesh.
        memory: Bytes on one device, as in `StepDescription`.

    Returns:
        Some sentences; "" if the step fits.
    """
    total = sum(memory.values())
    if total <= _ACCELERATOR_BYTES:
        return ""
    text = (
        f"A device needs {_size(total)}, more than the {_ACCELERATOR_BYTES / 1e9:.0f} GB of an"
        " accelerator such as the H100."
    )
    state = memory["parameters"] + memory["optimizer state"]
    if state > _ACCELERATOR_BYTES / 2:
        text += (
            f"\nTo lower parameters and optimizer state ({_size(state)}), shard them over more"
            " devices: raise mesh.fsdp, mesh.tp or mesh.pp."
        )
    if memory["temporary"] > _ACCELERATOR_BYTES / 2:
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        rows = config.data.batch_size // shards // config.trainer.num_minibatches
        tokens = config.data.context_length // mesh.shape["cp"]
        ways = ["raise trainer.num_minibatches, which leaves the result unchanged"]
        if config.model.remat != "block":
            ways.append(f"set model.remat=block (now {config.model.remat})")
        if config.model.dtype == "float32":
            ways.append("set model.dtype=bfloat16")
        ways += [
            "raise mesh.dp or mesh.fsdp, on more devices",
            "raise mesh.cp, on more devices, which share the tokens of each row",
            "lower data.batch_size",
            "lower data.context_length",
        ]
        text += (
            f"\nTo lower temporary memory ({_size(memory['temporary'])}), mostly activations of the"
            f" {rows:,} x {tokens:,} tokens that a device computes at once:"
            + "".join(f"\n  - {way}" for way in ways)
        )
    return text


def _memory_table(memory: dict[str, int]) -> Table:
    table = Table(title="memory of one device", box=box.SIMPLE)
    table.add_column("what")
    table.add_column("size", justify="right")
    for name, num_bytes in memory.items():
        table.add_row(name, _size(num_bytes))
    table.add_row("total", _size(sum(memory.values())))
    return table


def _traffic_table(description: StepDescription, mesh: Mesh) -> Table:
    found, expected = {}, {}
    for collective in description.collectives:
        found.setdefault((collective.axes, collective.kind), []).append(collective)
    for traffic in description.expected:
        expected.setdefault((traffic.axes, traffic.kind), []).append(traffic)
    table = Table(
        title="what a step sends",
        caption="The expected columns leave out the sums of metrics and norms, and carried states.",
        box=box.SIMPLE,
    )
    for name in ("axes", "kind", "count", "expected", "size", "expected", "what"):
        justify = "left" if name in ("axes", "kind", "what") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "what")

    def order(key: tuple[tuple[str, ...], str]) -> tuple:
        return [mesh.axis_names.index(axis) for axis in key[0]], key[1]

    for axes, kind in sorted(found.keys() | expected.keys(), key=order):
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
    """Compiles the step of the config and prints its description."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config()
    initialize_devices()
    mesh = create_run_mesh(config)
    console = Console()
    for line in (
        mesh_line(mesh),
        unused_accelerator_line(mesh),
        mlstm_line(config.language_model, mesh.devices.flat[0]),
    ):
        if line:
            console.print(line, highlight=False, soft_wrap=True)
    clock = Clock()
    with report_waits(clock, print_line), clock.phase("compile"):
        description = describe_step(config, mesh)
    stages = mesh.shape["pp"]
    if stages > 1:
        bubble = bubble_fraction(stages, config.mesh.count_microbatches(stages))
        console.print(f"pipeline bubble: {bubble:.0%} of the time of the blocks", highlight=False)
    print_table(_memory_table(description.memory))
    advice = memory_advice(config, mesh, description.memory)
    if advice:
        console.print(f"{advice}\n", highlight=False, soft_wrap=not console.is_terminal)
    print_table(_traffic_table(description, mesh))


if __name__ == "__main__":
    run(main, define_config_flags)
