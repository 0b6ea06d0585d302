"""Times mLSTM backends, or the training step of a config with `--train_step`.

    bazel run //xlstm/tools:benchmark -- --backends=fwbw,recurrent --chunk_sizes=32,64
    bazel run //xlstm/tools:benchmark -- --dtype=bfloat16 --implementations=mosaic,xla
    bazel run //xlstm/tools:benchmark -- --train_step --config=NAME

The rate of a large dense matmul is measured in the same process between the runs. The backends take
their options from the config, such as `--config.backend.keep_G=False`. Backends and matmul multiply
float32 as `model.matmul_precision` says; all other fields affect the training step only.

To compare an mLSTM of another library, write a module with

    def function(q, k, v, i, f, chunk_size): ...

that maps `q, k (B, NH, T, DHQK)`, `v (B, NH, T, DHV)` and the pre-activations of the gates
`i, f (B, NH, T)` to `h (B, NH, T, DHV)`, where a chunk size of None means one chunk, and name it
with `--external=module:function`. It multiplies with its own precision or JAX's default.
`--peers=mlstm_kernels` times the Triton kernels of that package, if it is installed next to torch.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xlstm.files import write_atomically
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import mlstm_line
from xlstm.tools import processes
from xlstm.tools.benchmarks.backends import time_candidates
from xlstm.tools.benchmarks.candidates import (
    Candidate,
    Shape,
    backend_candidates,
    external_candidates,
    parse_chunk_size,
    parse_shape,
)
from xlstm.tools.benchmarks.peers import PEER_CHUNK_SIZES, peer_candidates
from xlstm.tools.benchmarks.timed import PASSES
from xlstm.tools.benchmarks.train_step import time_train_step
from xlstm.tools.command_line import output_path, print_table, resolve_path, run
from xlstm.tools.config import config_name, define_config_flags, run_config
from xlstm.trainer.llm.config import RunConfig

_REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Number of timed runs of each candidate.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as a list of objects.")
_TRAIN_STEP = flags.DEFINE_bool(
    "train_step", False, "Times the training step of the config instead of backends."
)
_BACKENDS = flags.DEFINE_list(
    "backends", None, "Backends to time. The default is the backend of the config."
)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["1x4x1024x64x128", "1x4x8192x64x128", "1x4x1024x256x512"],
    "Sizes of the inputs, as BxNHxTxDHQKxDHV.",
)
_CHUNK_SIZES = flags.DEFINE_list(
    "chunk_sizes",
    None,
    "Tokens in a chunk; 0 means one chunk, and sizes above T are skipped. The default is the chunk"
    " size of the config.",
)
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations",
    None,
    "Programs of fwbw to time: mosaic (kernels for Hopper GPUs; they need --dtype=bfloat16 and have"
    " chunks of 64 tokens), xla, or auto, which chooses one. The default is that of the config.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Dtype of q, k and v. Gates are float32."
)
_EXTERNAL = flags.DEFINE_list(
    "external",
    [],
    "Functions to time next to the backends, as module:function. Modules are also searched in the"
    " folder in which the tool was called.",
)
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    "Other libraries whose kernels to time next to the backends: mlstm_kernels (chunks of"
    f" {', '.join(map(str, PEER_CHUNK_SIZES))} tokens unless --chunk_sizes is given).",
)
_FOR_BACKENDS = (_BACKENDS, _SHAPES, _CHUNK_SIZES, _IMPLEMENTATIONS, _DTYPE, _EXTERNAL, _PEERS)


def main(argv: list[str]) -> None:
    """Times what the flags choose, and prints or writes the figures."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    _reject_flags_of_the_other_mode()
    config = run_config()
    json_path = output_path("json", _JSON.value)
    if _TRAIN_STEP.value:
        processes.initialize_devices()
    rows = _time_train_step(config) if _TRAIN_STEP.value else _time_backends(config)
    if jax.process_index():
        return
    source = {
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        "matmul_precision": config.model.matmul_precision,
    }
    rows = [source | row for row in rows]
    if json_path:
        write_atomically(json_path, json.dumps(rows, indent=2) + "\n")
    for table in [_train_step_table(rows[0])] if _TRAIN_STEP.value else _backend_tables(rows):
        print_table(table)


def _reject_flags_of_the_other_mode() -> None:
    if _TRAIN_STEP.value:
        others, reason = _FOR_BACKENDS, "is for backends and has no effect with --train_step"
    else:
        others = flags.FLAGS.flags_by_module_dict()[processes.__name__]
        reason = "needs --train_step; backends are timed on one device"
    for flag in others:
        if flags.FLAGS[flag.name].present:
            raise ValueError(f"--{flag.name} {reason}")


def _time_backends(config: RunConfig) -> list[dict[str, Any]]:
    """Times all candidates at all shapes; returns a row for each pair."""
    shapes = [parse_shape(text) for text in _SHAPES.value]
    if _EXTERNAL.value:
        sys.path.append(resolve_path(""))
    fitting = {shape: _candidates(config, shape) for shape in shapes}
    for shape, found in fitting.items():
        if not found:
            raise ValueError(
                f"nothing to time for --shapes={shape}: expected --backends, --external or --peers,"
                f" and a --chunk_sizes of at most T={shape.time} (0 is one chunk)"
            )
    rows = []
    steps = len(PASSES) * (_REPEATS.value + 1)
    with _progress_bar() as progress:
        tasks = {
            shape: progress.add_task(str(shape), total=steps * len(found))
            for shape, found in fitting.items()
        }
        for shape, found in fitting.items():
            dtype = jnp.dtype(_DTYPE.value)
            advance = _advancer(progress, tasks[shape])
            rows += time_candidates(
                shape, found, dtype, _REPEATS.value, advance, config.model.precision
            )
    return rows


def _candidates(config: RunConfig, shape: Shape) -> list[Candidate]:
    """Returns the candidates that the flags choose, if their chunks fit into the shape."""
    chunk_sizes, peer_chunk_sizes = [config.backend.chunk_size], PEER_CHUNK_SIZES
    if _CHUNK_SIZES.value is not None:
        chunk_sizes = [parse_chunk_size(text) for text in _CHUNK_SIZES.value]
        peer_chunk_sizes = [size or shape.time for size in chunk_sizes]
    # The peers come first, since they have to be loaded before JAX starts the devices.
    peers = [x for name in _PEERS.value for x in peer_candidates(name, peer_chunk_sizes, shape)]
    names = [config.backend.name] if _BACKENDS.value is None else _BACKENDS.value
    implementations = _IMPLEMENTATIONS.value
    if implementations is None:
        implementations = [config.backend.implementation]
    candidates = []
    for name in names:
        choice = dataclasses.replace(config.backend, name=name)
        candidates += backend_candidates(
            choice, chunk_sizes, implementations, shape, jnp.dtype(_DTYPE.value), config.model
        )
    for name in _EXTERNAL.value:
        candidates += external_candidates(name, chunk_sizes, shape)
    return [x for x in candidates + peers if x.fits(shape)]


def _time_train_step(config: RunConfig) -> list[dict[str, Any]]:
    """Times the training step; returns its row."""
    with _progress_bar() as progress:
        task = progress.add_task("training step", total=_REPEATS.value + 1)
        figures = time_train_step(config, _REPEATS.value, _advancer(progress, task))
    program = mlstm_line(config.language_model, jax.devices()[0])
    return [{"config": config_name(), "program": program} | figures]


def _progress_bar() -> Progress:
    # A refreshing thread would distort the timings.
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)


def _advancer(progress: Progress, task: Any) -> Callable[[], None]:
    progress.refresh()
    return lambda: progress.update(task, advance=1, refresh=True)


def _backend_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Returns a table for each shape, with a line for each candidate and pass."""
    tables = {}
    for row in rows:
        if row["shape"] not in tables:
            tables[row["shape"]] = _backend_table(row)
        chunk_size = {None: "", 0: "one"}.get(row["chunk_size"], row["chunk_size"])
        backend = f"{row['backend']} {row['implementation']}".rstrip()
        for index, name in enumerate(PASSES):
            tables[row["shape"]].add_row(
                *(("", "") if index else (backend, str(chunk_size))),
                "+ backward" if index else name,
                f"{row[f'{name}_median_ms']:.2f}",
                f"{row[f'{name}_min_ms']:.2f}",
                f"{row[f'{name}_compile_s']:.2f}",
                f"{row[f'{name}_temporary_memory_mib']:,.1f}",
                f"{row[f'{name}_matmul_fraction']:.1%}",
                f"{row[f'{name}_ratio_to_first']:.2f}",
            )
    return list(tables.values())


def _backend_table(row: dict[str, Any]) -> Table:
    """Returns an empty table, titled with the row's shape."""
    title = (
        f"\nBxNHxTxDHQKxDHV {row['shape']}, {row['dtype']}, {row['device']},"
        f" jax {row['jax_version']}; dense matmul: {row['matmul_rate_gflop_per_s']:,.0f} GFLOP/s"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("backend", overflow="fold")
    table.add_column("chunk", justify="right")
    table.add_column("pass", no_wrap=True)
    columns = ("median\nms", "min\nms", "compile\ns", "memory\nMiB", "of\nmatmul", "ratio\nto 1st")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _train_step_table(row: dict[str, Any]) -> Table:
    """Returns a table of the figures of a training step."""
    on_device = row.get("peak_device_memory_mib")
    table = Table(
        title=f"training step of {row['config']} on {row['device']}, jax {row['jax_version']}",
        caption=row["program"],
    )
    for column, justify in (("figure", "left"), ("value", "right")):
        table.add_column(column, justify=justify)
    for name, value in (
        ("parameters", f"{row['parameters']:,}"),
        ("compile time", f"{row['compile_s']:.1f} s"),
        ("step, median", f"{row['step_median_ms']:.1f} ms"),
        ("step, fastest", f"{row['step_min_ms']:.1f} ms"),
        ("speed", f"{row['tokens_per_s']:,.0f} tokens/s"),
        ("dense matmul", f"{row['matmul_rate_gflop_per_s']:,.0f} GFLOP/s"),
        ("fraction of the dense matmul", f"{row['matmul_fraction']:.1%}"),
        ("temporary memory of the step", f"{row['temporary_memory_mib']:,.0f} MiB"),
        ("peak resident memory", f"{row['peak_resident_memory_mib']:,.0f} MiB"),
        ("peak memory of the device", on_device and f"{on_device:,.0f} MiB"),
    ):
        if value:
            table.add_row(name, value)
    return table


if __name__ == "__main__":
    run(main, define_config_flags)
