"""What a person sees of a run."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from xlstm.trainer.logger.base_logger import Logger, validation_suffixes
from xlstm.visible_text import visible

_SECONDS_BETWEEN_LINES = 10.0


class TerminalLogger(Logger):
    """A progress bar with loss, speed and time left; without a terminal, a line now and then."""

    def __init__(self, console: Console, start_step: int, num_steps: int):
        """Makes the logger; the bar appears with the first step."""
        self._console, self._num_steps = console, num_steps
        self._live = console.is_terminal
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=start_step, status=""
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        """Shows a row: evaluations as lines that stay, the rest in the bar."""
        for suffix in validation_suffixes(row):
            text = (
                f"step {step:>7,}  validation loss {row['val_loss' + suffix]:.4f}"
                f"  perplexity {row['val_perplexity' + suffix]:.2f}"
                f"  accuracy {row['val_accuracy' + suffix]:.1%}"
            )
            bits = row.get(f"val_bits_per_byte{suffix}")  # Of text alone.
            text += "" if bits is None else f"  bits per byte {bits:.3f}"
            self._console.print(f"{text}{suffix and f'  ({visible(suffix[1:])})'}", markup=False)
        if "loss" not in row or "tokens_per_second" not in row:
            return  # An evaluation, or a step that was left out.
        status = (
            f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            f"  {row['matmul_fraction']:.0%} of matmul rate"
        )
        self._progress.update(self._task, status=status)
        now = time.monotonic()
        if not self._live and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"step {step:>7,} of {self._num_steps:,}  {status}")

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._live:
            self._progress.start()
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()
