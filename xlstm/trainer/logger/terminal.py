"""The terminal's view of a run: a progress bar, evaluations, and the mesh."""

import importlib.util
import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xlstm.trainer.logger.base_logger import Logger, validation_suffixes
from xlstm.visible_text import visible

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_SPEED = 3600.0  # Of which the time left is estimated; a step may take a minute.
_SHORTEST_BAR, _LONGEST_BAR = 4, 40  # Characters.
_GAP = "  "  # Between the parts of the bar's line.
# Modules of JAX's packages for accelerators, and what to check if JAX uses the CPU with them.
_ACCELERATORS = {
    "jax_cuda13_plugin": "the driver (nvidia-smi), which CUDA 13 needs in version 580 or newer",
    "jax_cuda12_plugin": "the driver (nvidia-smi), which CUDA 12 needs in version 525 or newer",
    "libtpu": "that this machine has a TPU that no other process uses",
}


def mesh_line(mesh: Mesh) -> str:
    """Returns a line that says how the devices are used, such as `mesh: dp=4, fsdp=2, ...`.

    Args:
        mesh: The mesh.
    """
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return f"mesh: {sizes} ({mesh.size:,} {kind} {'device' if mesh.size == 1 else 'devices'})"


def unused_accelerator_line(mesh: Mesh) -> str:
    """Returns a line that says that JAX does not use the accelerator that it has packages for.

    Args:
        mesh: The mesh.

    Returns:
        The line; "" if there are no such packages, JAX uses them, or `JAX_PLATFORMS` asks for the
        CPU.
    """
    platforms = jax.config.jax_platforms or ""
    if mesh.devices.flat[0].platform != "cpu" or platforms.startswith("cpu"):
        return ""
    for package, what_to_check in _ACCELERATORS.items():
        if importlib.util.find_spec(package):
            return (
                f"{package} is installed, but JAX uses the CPU: check {what_to_check}, and"
                f" JAX_PLATFORMS, which is {platforms or 'not set'} ('cpu' hides this line)"
            )
    return ""


def format_accuracy(accuracy: float) -> str:
    """Returns an accuracy as every tool shows it: in percent, with two digits after the point."""
    return f"{accuracy:.2%}"


def validation_line(step: int, scalars: dict[str, float], suffix: str) -> str:
    """Returns a line about the evaluation of one validation set.

    Args:
        step: The step after which it was made.
        scalars: The evaluation's metrics.
        suffix: The set's suffix in the keys of `scalars`; see `validation_suffixes`.
    """
    name = f"validation {visible(suffix[1:])}" if suffix else "validation"
    text = (
        f"step {step:>7,}  {name}: loss {scalars['val_loss' + suffix]:.4f}"
        f"  perplexity {scalars['val_perplexity' + suffix]:.2f}"
        f"  accuracy {format_accuracy(scalars['val_accuracy' + suffix])}"
    )
    bits = scalars.get(f"val_bits_per_byte{suffix}")  # Only text has bytes.
    return text if bits is None else f"{text}  bits/byte {bits:.3f}"


class TerminalLogger(Logger):
    """A progress bar with loss, speed and time left; without a terminal, a line now and then."""

    def __init__(self, console: Console, start_step: int, num_steps: int):
        """Makes the logger; the bar appears with the first step."""
        self._console, self._num_steps = console, num_steps
        self._live = console.is_terminal
        self._last_line = 0.0
        self._progress = Progress(
            _Line(console),
            console=console,
            speed_estimate_period=_SECONDS_OF_SPEED,
            disable=not self._live,
        )
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=start_step, loss="", speed="", matmul=""
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Shows metrics: evaluations as lines that stay, other metrics in the bar."""
        for suffix in validation_suffixes(scalars):
            self._print(validation_line(step, scalars, suffix))
        if "loss" not in scalars or "tokens_per_second" not in scalars:
            return  # An evaluation or a skipped step.
        fields = {
            "loss": f"loss {scalars['loss']:.4f}",
            "speed": f"{scalars['tokens_per_second']:,.0f} tokens/s",
            "matmul": f"{scalars['matmul_fraction']:.0%} of matmul rate",
        }
        self._progress.update(self._task, **fields)
        now = time.monotonic()
        if not self._live and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print(f"step {step:>7,} of {self._num_steps:,}  {'  '.join(fields.values())}")

    def _print(self, line: str) -> None:
        # The line stays whole: a terminal wraps it, and a file holds it as one line.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._live:
            self._progress.start()
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Stops the bar and leaves it on the screen."""
        self._progress.stop()


class _Line(ProgressColumn):
    """The bar and its figures on one line, without those that do not fit the terminal."""

    max_refresh = None

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Table:
        fields = task.fields
        # In the order of their importance; the number is its position on the line.
        parts = [
            (0, fields["loss"]),
            (4, _hours(task.time_remaining, "left")),
            (1, fields["speed"].replace("tokens/s", "tok/s")),
            (3, _hours(task.elapsed, "elapsed")),
            (2, fields["matmul"]),
        ]
        steps = f"step {task.completed:,.0f}/{task.total:,.0f} "
        room = self._console.width - len(steps) - _SHORTEST_BAR
        shown = []
        for position, text in parts:
            if text and len(text) + len(_GAP) <= room:
                room -= len(text) + len(_GAP)
                shown.append((position, text))
        bar_width = min(room + _SHORTEST_BAR, _LONGEST_BAR)
        bar = ProgressBar(total=task.total, completed=task.completed, width=max(bar_width, 1))
        grid = Table.grid()
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_row(Text(steps), bar, Text("".join(_GAP + text for _, text in sorted(shown))))
        return grid


def _hours(seconds: float | None, what: str) -> str:
    """Returns a duration as `0:12:34 left`; nothing while it is unknown."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} {what}"
