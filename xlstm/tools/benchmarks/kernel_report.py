"""Compiles the mLSTM's kernels for an H100, on any Linux machine, and prints what they need.

    bazel run --config=cuda13 //xlstm/tools:kernel_report
    bazel run --config=cuda13 //xlstm/tools:kernel_report -- --shapes=1x4x4096x256x256

No GPU and no driver is needed. JAX prefers the ptxas of a CUDA toolkit, on the PATH or in
/usr/local/cuda, to that of its packages, and spills differ from version to version.

Each row is a pass of the mLSTM, in bfloat16, and one kernel:

* `features` of `a` and `b`, and of `x`; see `decayed_attention` for their roles in each pass;
* `width`: features that a warpgroup owns; `stages`: chunks of `a`, `b` and `x` loaded ahead;
  `KiB`: shared memory of a block; `blocks`: those of the kernel, of which each multiprocessor, 132
  in all, holds one at a time;
* `registers` of a thread at the start, and `spilled` bytes of a thread, as ptxas reports them. The
  three warpgroups of a block start with the same number, 168; the loading one then gives most of
  its registers to the computing ones, which have 240. Spills are those of the 240;
* `useful`: operations of the products, of which the pairs of a chunk count half; `done`: those of
  the tensor cores, which compute whole chunks, and the scores once for each warpgroup's features;
* `GB`: each input and output once; `floor`: the longer of the times that the operations done and
  the bytes need at the rates of an H100's data sheet.

The exit status is 1 if a kernel spills more than `--most_spilled` bytes.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich import box
from rich.table import Table

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    CHUNK,
    Inputs,
    Options,
    Outputs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import decayed_attention_hopper
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import (
    choose_tiling,
    head_dims,
    shared_bytes,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import (
    mosaic_backward,
    mosaic_forward,
)
from xlstm.tools.benchmarks.candidates import H100_RATES, Shape, parse_shape
from xlstm.tools.command_line import print_note, print_table, run

_SHAPES = flags.DEFINE_list(
    "shapes",
    ["8x8x8192x256x512", "16x8x4096x64x128", "8x8x8192x128x256", "8x8x8192x512x512"],
    "Sizes BxNHxTxDHQKxDHV of the inputs.",
)
_MOST_SPILLED = flags.DEFINE_integer(
    "most_spilled", 128, "Bytes that a thread may spill.", lower_bound=0
)

# The card to compile for, a text proto of XLA's `GpuTargetConfigProto`. `feature_extension` stands
# for the `a` of sm_90a.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_memory_size: 84942979072
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class Pass(NamedTuple):
    """A pass of the mLSTM.

    Attributes:
        name: Its name.
        inputs: Shapes and types of its inputs.
        options: Its options.
        outputs: Shapes and types of its outputs.
    """

    name: str
    inputs: Inputs
    options: Options
    outputs: Outputs


class Counts(NamedTuple):
    """Work of a pass.

    Attributes:
        useful: Operations of the products, of which the pairs of a chunk count half.
        done: Operations of the tensor cores.
        num_bytes: Bytes of the inputs and outputs.
    """

    useful: int
    done: int
    num_bytes: int


class Resources(NamedTuple):
    """What ptxas reports about a kernel: registers and spilled bytes of a thread."""

    registers: int
    spilled: int


def main(argv: list[str]) -> None:
    """Compiles all passes, and prints the table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    shapes = [parse_shape(text) for text in _SHAPES.value]
    device = h100()
    table = _new_table(f"{device.device_kind}, jax {jax.__version__}")
    spilled = []
    for shape in dict.fromkeys(shapes):
        for item in passes(shape):
            start = time.monotonic()
            resources = parse_ptxas(compile_pass(item, device))
            seconds = time.monotonic() - start
            spilled.append(resources.spilled)
            table.add_row(str(shape), *_cells(item, resources, seconds))
        table.add_section()
    print_table(table)
    if max(spilled) > _MOST_SPILLED.value:
        print_note(f"a kernel spills {max(spilled)} bytes; expected at most {_MOST_SPILLED.value}")
        sys.exit(1)


def h100() -> jax.Device:
    """Returns an H100 to compile for; the machine need not have one.

    Raises:
        ValueError: If JAX's CUDA plugin is not installed.
    """
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        raise ValueError(
            "JAX's CUDA plugin, which compiles the kernels, is not installed: use --config=cuda13,"
            " or install jax[cuda13]"
        )
    jax.config.update("jax_platforms", "cpu")  # So the plugin is loaded without a driver.
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=_H100)
    return topology.devices[0]


def passes(shape: Shape) -> list[Pass]:
    """Returns the passes of the mLSTM, in bfloat16 and in the layout of a layer.

    Args:
        shape: Sizes of the inputs.

    Returns:
        The passes: forward, and backward without kept states, in the order in which they run; then
        forward with states kept.
    """
    found = []

    def record(inputs: Inputs, options: Options) -> Outputs:
        outputs = decayed_attention_hopper(inputs, options)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (inputs, outputs))
        item = Pass(_pass_name(inputs, options), shapes[0], options, shapes[1])
        if item not in found:
            found.append(item)
        return outputs

    def trace(q, v, gate):
        arguments = MLSTMArguments(q, q, v, gate, gate)
        how = {"stabilize_correctly": True, "attend": record}
        forward = functools.partial(
            mosaic_forward, arguments, first_state=None, reset=None, return_state=False, **how
        )
        _, ctx = forward(keep_states=False)
        mosaic_backward(ctx, v, None, context_axis=None, **how)
        forward(keep_states=True)

    rows = (shape.batch, shape.num_heads, shape.time)
    q, v = (jax.ShapeDtypeStruct((*rows, dim), jnp.bfloat16) for dim in (shape.qk_dim, shape.v_dim))
    jax.eval_shape(trace, q, v, jax.ShapeDtypeStruct(rows, jnp.float32))
    return found


def _pass_name(inputs: Inputs, options: Options) -> str:
    if not options.outputs:
        return "states"
    if options.normalize:
        return "forward, states kept" if options.emit_states else "forward"
    if inputs.partner_states is not None:
        return "dv"
    return "dq" if inputs.partner_scores is None else "dk"


def count(item: Pass) -> Counts:
    """Counts the work of a pass; a multiplication and an addition are two operations.

    Args:
        item: The pass.

    Returns:
        The work.
    """
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((item.inputs, item.outputs)))
    n, num_chunks, _, _ = item.inputs.gates.shape
    tokens, (d, e) = n * num_chunks * CHUNK, head_dims(item.inputs)
    state = 2 * d * e  # For each token, to read the state, and to update it.
    if not item.options.outputs:
        return Counts(tokens * state, tokens * state, num_bytes)
    num_scores = e // choose_tiling(item.inputs, item.options).width  # Times they are computed.
    # Crossings read the state once more in every second chunk.
    states = 2 * state + (state // 2 if item.options.emit_crossings else 0)
    useful = CHUNK * (d + e) + states
    done = 2 * CHUNK * (num_scores * d + e) + states
    return Counts(tokens * useful, tokens * done, num_bytes)


def compile_pass(item: Pass, device: jax.Device) -> str:
    """Compiles the kernel of a pass.

    Args:
        item: The pass.
        device: The device to compile for.

    Returns:
        What ptxas reports.

    Raises:
        ValueError: If it does not compile.
    """
    sharding = SingleDeviceSharding(device)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), item.inputs
    )
    lowered = jax.jit(lambda inputs: decayed_attention_hopper(inputs, item.options)).lower(inputs)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    with tempfile.TemporaryFile() as file:
        try:
            with _output_to(file.fileno()):
                lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the kernel of the pass {item.name} does not compile: {reason} (--config=cuda13"
                " installs the compiler: nvidia-cuda-nvcc and nvidia-nvvm)"
            ) from error
        file.seek(0)
        return file.read().decode(errors="replace")


@contextlib.contextmanager
def _output_to(file: int) -> Iterator[None]:
    """Redirects the output of the process, and so of libraries that are not Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in kept:
            os.dup2(file, number)
        yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)


def parse_ptxas(text: str) -> Resources:
    """Parses what ptxas reports about one kernel.

    Args:
        text: The report.

    Returns:
        The registers, and the larger number of the bytes that are stored and loaded.

    Raises:
        ValueError: If the text is no such report.
    """
    registers = re.findall(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    if not registers or not spilled:
        raise ValueError(f"ptxas reported neither registers nor spills, but: {text.strip()!r}")
    return Resources(max(map(int, registers)), max(map(int, spilled)))


def _new_table(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for name in ("shape", "pass"):
        table.add_column(name)
    for name in (
        *("features", "width", "stages", "KiB", "blocks", "registers", "spilled", "compile\ns"),
        *("useful\nTFLOP", "done\nTFLOP", "GB", "floor\nms"),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(item: Pass, resources: Resources, seconds: float) -> list[str]:
    """Returns the cells of a row, from the pass on."""
    tiling, work = choose_tiling(item.inputs, item.options), count(item)
    floor = max(work.done / H100_RATES["operations"], work.num_bytes / H100_RATES["bytes"])
    stages = (tiling.a_stages, tiling.b_stages, tiling.x_stages)
    d, e = head_dims(item.inputs)
    num_blocks = item.inputs.gates.shape[0] * item.options.segments * e // (2 * tiling.width)
    return [
        item.name,
        f"{d}x{e}",
        str(tiling.width),
        " ".join(map(str, stages if item.options.outputs else stages[1:])),
        f"{shared_bytes(item.inputs, item.options, tiling) / 1024:.0f}",
        str(num_blocks),
        str(resources.registers),
        str(resources.spilled),
        f"{seconds:.1f}",
        f"{work.useful / 1e12:.3f}",
        f"{work.done / 1e12:.3f}",
        f"{work.num_bytes / 1e9:.2f}",
        f"{floor * 1e3:.2f}",
    ]


if __name__ == "__main__":
    run(main)
