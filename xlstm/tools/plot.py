"""Draws the curves of runs, into a picture and in the terminal.

    bazel run //xlstm/tools:plot -- runs/a runs/b [--metrics=loss,grad_norm] [--output=curves.png]

A run is named by its folder or by its `metrics.jsonl`. Beside the curves, a table says how far each
run is and how well it does.
"""

import os
import statistics
from collections.abc import Mapping, Sequence

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from xlstm.tools.command_line import output_path, resolve_path, run
from xlstm.tools.terminal_plot import draw_in_terminal
from xlstm.trainer.logger.curves import draw_picture, is_point, read_curve, smooth
from xlstm.trainer.logger.jsonl import read_rows
from xlstm.visible_text import visible

_METRICS_FILE = "metrics.jsonl"
_DEFAULT_METRICS = ("loss", "val_loss")

_METRICS = flags.DEFINE_list(
    "metrics", None, "What to draw; every metric has axes of its own [loss,val_loss]."
)
_OUTPUT = flags.DEFINE_string("output", "curves.png", "The PNG file to write; empty for none.")
_SMOOTH = flags.DEFINE_integer(
    "smooth",
    None,
    "Draws for every step the mean of what the last so many steps have.",
    lower_bound=1,
)

Rows = list[dict[str, float]]


def read_runs(names: Sequence[str]) -> dict[str, Rows]:
    """Reads the metrics of runs.

    Args:
        names: Folders of runs or metrics files; relative ones start where the user called.

    Returns:
        For each run, by its folder as it was given, its rows.

    Raises:
        ValueError: If there is no such run, or it has no rows yet.
    """
    runs, known = {}, set()
    for name in names:
        path = resolve_path(name)
        if os.path.isdir(path):
            path = os.path.join(path, _METRICS_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"there is no {path}: expected the folder of a run, or its {_METRICS_FILE}"
            )
        rows = read_rows(path)
        if not rows:
            raise ValueError(f"{path} has no rows yet")
        if path not in known:
            known.add(path)
            label = name.rstrip(os.sep)
            if os.path.basename(label) == _METRICS_FILE and os.path.dirname(label):
                label = os.path.dirname(label)
            runs[label] = rows
    return runs


def choose_metrics(runs: Mapping[str, Rows], names: Sequence[str] | None) -> list[str]:
    """Checks the metrics to draw.

    Args:
        runs: The rows of each run.
        names: Metrics that one of the runs must have; None for the losses that there are.

    Returns:
        The metrics, each once.

    Raises:
        ValueError: If no run has a metric, or there is none to draw.
    """
    rows = [row for rows in runs.values() for row in rows]
    there = {name for row in rows for name, value in row.items() if is_point(value)} - {"step"}
    if not there:
        raise ValueError(f"there is nothing to draw in {', '.join(runs)}: the rows have no metrics")
    if names is None:
        names = [name for name in _DEFAULT_METRICS if name in there]
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise ValueError(
            f"--metrics={','.join(unknown)}: expected some of {', '.join(sorted(there))}"
        )
    return list(dict.fromkeys(names))


def summary_table(runs: Mapping[str, Rows]) -> Table:
    """Says for each run how far it is, how well it does and how fast it is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("last step", "last loss", "best val_loss", "at step", "tokens/s"):
        table.add_column(column, justify="right")
    for label, rows in runs.items():
        losses = read_curve(rows, "loss", "").values
        validation = read_curve(rows, "val_loss", "")
        speeds = read_curve(rows, "tokens_per_second", "").values
        best = validation.values.argmin() if len(validation.values) else None
        table.add_row(
            visible(label),
            f"{rows[-1]['step']:,}",
            f"{losses[-1]:.4f}" if len(losses) else "",
            f"{validation.values[best]:.4f}" if best is not None else "",
            f"{validation.steps[best]:,}" if best is not None else "",
            f"{statistics.median(speeds):,.0f}" if len(speeds) else "",
        )
    return table


def main(argv: Sequence[str]) -> None:
    """Draws the runs that the arguments name."""
    if not argv[1:]:
        raise ValueError("name one run or several: plot runs/a runs/b")
    runs = read_runs(argv[1:])
    metrics = choose_metrics(runs, _METRICS.value)
    output = output_path("output", _OUTPUT.value)

    panels = {
        metric: [read_curve(rows, metric, label) for label, rows in runs.items()]
        for metric in metrics
    }
    if output:
        draw_picture(panels, output, _SMOOTH.value)
    console = Console(highlight=False, markup=False, emoji=False)
    for metric, curves in panels.items():
        if _SMOOTH.value:
            curves = [smooth(curve, _SMOOTH.value) for curve in curves]
        draw_in_terminal(console, metric, curves)
    console.print(summary_table(runs))
    if output:
        console.print(f"the picture is {visible(output)}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
