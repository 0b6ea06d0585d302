"""Plots the metrics of runs."""

import os
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import plotext
from absl import flags
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xlstm.tools.command_line import output_path, resolve_path, run
from xlstm.trainer.logger.curves import Curve, is_point, plot_curves, read_curve, smooth
from xlstm.trainer.logger.jsonl import read_rows
from xlstm.visible_text import visible

_HEIGHT = 16
# Of the 256 of terminals, those next to the colours of pictures.
_COLOURS = (32, 208, 34, 160, 134, 94, 175, 244, 142, 38)
_MARKERS = "*+xo#@%&=~"  # Where there are no colours.


def draw_in_terminal(console: Console, title: str, curves: Sequence[Curve]) -> None:
    """Prints curves over steps, and below them which is which.

    A character is the mean of what falls on it: what is narrower can only be seen in a picture.

    Args:
        console: Where to print; the drawing is as wide.
        title: What stands above, such as the metric.
        curves: At least one with points; those without are left out.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    coloured = console.color_system is not None
    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(console.width, _HEIGHT)
    figure.theme("colorless")
    figure.legend(False)
    figure.title(visible(title))
    figure.label("step")
    legend = Text()
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        symbol = _MARKERS[number % len(_MARKERS)]
        marker = plotext.marker("braille", plotext.pixel(colour)) if coloured else symbol
        steps, values = _thinned(curve, 2 * console.width)
        signal = figure.signal(steps.tolist(), values.tolist(), marker=marker)
        signal.lines()
        figure.draw(signal)
        symbol, style = ("━━", f"color({colour})") if coloured else (symbol, "")
        legend.append(f"{symbol} ", style).append(f"{visible(curve.label)}   ")
    steps, values = (
        np.concatenate([getattr(curve, name) for curve in curves]) for name in ("steps", "values")
    )
    figure.ruler("x").ticks(*_ticks(steps, 5, integer=True))
    figure.ruler("y").ticks(*_ticks(values, 6))
    console.print(Text.from_ansi(figure.build().string()), soft_wrap=True)
    console.print(legend)


def _thinned(curve: Curve, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of steps, at most so many."""
    if len(curve.steps) <= most:
        return curve.steps, curve.values
    edges = np.linspace(curve.steps[0], curve.steps[-1] + 1, most + 1)
    stretches = np.searchsorted(edges, curve.steps, side="right") - 1
    counts = np.bincount(stretches, minlength=most)
    there = counts > 0
    means = (
        np.bincount(stretches, weights, most)[there] / counts[there]
        for weights in (curve.steps, curve.values)
    )
    return next(means), next(means)


def _ticks(values: np.ndarray, number: int, integer: bool = False) -> tuple[list, list[str]]:
    """Round numbers within the range of the values, and how to write them."""
    low, high = values.min(), values.max()
    locator = MaxNLocator(number, integer=integer, steps=[1, 2, 5, 10])
    ticks = locator.tick_values(low, high)
    ticks = [float(tick) for tick in ticks if low <= tick <= high]
    return ticks, [f"{tick:,.0f}" if integer else f"{tick:.6g}" for tick in ticks]


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
        plot_curves(panels, output, _SMOOTH.value)
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
