"""Plots the metrics of runs, in the terminal and as a picture.

    bazel run //xlstm/tools:plot -- runs/a runs/b
    bazel run //xlstm/tools:plot -- runs/a runs/b --metrics=loss,val_loss --output=curves.png

A run is named by its folder. A table at the end compares the losses and the speeds of the runs.
"""

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

from xlstm.tools.command_line import output_path, print_table, resolve_path, run
from xlstm.trainer.logger.curves import (
    ACCURACY,
    Curve,
    axis_label,
    is_point,
    plot_curves,
    read_curve,
    smooth,
)
from xlstm.trainer.logger.jsonl import read_rows
from xlstm.visible_text import visible

_HEIGHT = 16
# The terminal's colors, of 256, that are closest to those of the picture.
_COLORS = (32, 208, 34, 160, 134, 94, 175, 244, 142, 38)
_MARKERS = "*+xo#@%&=~"  # For terminals without colors.


def draw_in_terminal(console: Console, title: str, curves: Sequence[Curve]) -> None:
    """Prints curves over steps, with a title and a legend.

    A character shows the mean of the values that fall on it; narrower features are visible in a
    picture only.

    Args:
        console: Where to print; the drawing is as wide as the console.
        title: The title, such as the metric.
        curves: At least one curve with points; curves without points are left out.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    colored = console.color_system is not None
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
        color = _COLORS[number % len(_COLORS)]
        symbol = _MARKERS[number % len(_MARKERS)]
        marker = plotext.marker("braille", plotext.pixel(color)) if colored else symbol
        steps, values = _thinned(curve, 2 * console.width)
        signal = figure.signal(steps.tolist(), values.tolist(), marker=marker)
        signal.lines()
        figure.draw(signal)
        symbol, style = ("━━", f"color({color})") if colored else (symbol, "")
        legend.append(f"{symbol} ", style).append(f"{visible(curve.label)}   ")
    steps, values = (
        np.concatenate([getattr(curve, name) for curve in curves]) for name in ("steps", "values")
    )
    figure.ruler("x").ticks(*_ticks(steps, 5, integer=True))
    figure.ruler("y").ticks(*_ticks(values, 6, percent=title.startswith(ACCURACY)))
    console.print(Text.from_ansi(figure.build().string()), soft_wrap=True)
    console.print(legend)


def _thinned(curve: Curve, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values as means over at most `most` equal intervals of steps."""
    if len(curve.steps) <= most:
        return curve.steps, curve.values
    edges = np.linspace(curve.steps[0], curve.steps[-1] + 1, most + 1)
    stretches = np.searchsorted(edges, curve.steps, side="right") - 1
    counts = np.bincount(stretches, minlength=most)
    filled = counts > 0
    means = (
        np.bincount(stretches, weights, most)[filled] / counts[filled]
        for weights in (curve.steps, curve.values)
    )
    return next(means), next(means)


def _ticks(
    values: np.ndarray, number: int, integer: bool = False, percent: bool = False
) -> tuple[list, list[str]]:
    """Returns round numbers within the range of the values, and their text."""
    low, high = values.min(), values.max()
    locator = MaxNLocator(number, integer=integer, steps=[1, 2, 5, 10])
    ticks = locator.tick_values(low, high)
    ticks = [float(tick) for tick in ticks if low <= tick <= high]
    if integer:
        return ticks, [f"{tick:,.0f}" for tick in ticks]
    return ticks, [f"{100 * tick:.6g}%" if percent else f"{tick:.6g}" for tick in ticks]


_METRICS_FILE = "metrics.jsonl"
_DEFAULT_METRICS = ("loss", "val_loss")

_METRICS = flags.DEFINE_list(
    "metrics",
    None,
    "Keys of metrics.jsonl to draw, each on axes of its own. The default is loss,val_loss.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "PNG file to write. By default the curves are drawn in the terminal only."
)
_SMOOTH = flags.DEFINE_integer(
    "smooth", None, "Draws at each step the mean over the last N steps.", lower_bound=1
)
_CHANCE = flags.DEFINE_float(
    "chance",
    None,
    "Draws a horizontal line at this accuracy, such as 0.5 for parity, in every plot of an"
    " accuracy.",
    lower_bound=0.0,
    upper_bound=1.0,
)

Rows = list[dict[str, float]]


def read_runs(names: Sequence[str]) -> dict[str, Rows]:
    """Reads the metrics of runs.

    Args:
        names: Run folders or metrics files; relative ones start where the user called the tool.

    Returns:
        The rows of each run, by its folder as it was given.

    Raises:
        ValueError: If a run does not exist or has no rows yet.
    """
    runs, known = {}, set()
    for name in names:
        path = resolve_path(name)
        if os.path.isdir(path):
            path = os.path.join(path, _METRICS_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"there is no {path}: expected a run folder, or its {_METRICS_FILE}")
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
    """Returns the metrics to draw, each once.

    Args:
        runs: The rows of each run.
        names: Metrics that one of the runs must have; None for the losses that the runs have.

    Raises:
        ValueError: If no run has one of the metrics, or none is left to draw.
    """
    rows = [row for rows in runs.values() for row in rows]
    known = {name for row in rows for name, value in row.items() if is_point(value)} - {"step"}
    if not known:
        raise ValueError(f"there is nothing to draw in {', '.join(runs)}: the rows have no metrics")
    if names is None:
        names = [name for name in _DEFAULT_METRICS if name in known]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"--metrics={','.join(unknown)}: expected some of {', '.join(sorted(known))}"
        )
    return list(dict.fromkeys(names))


def summary_table(runs: Mapping[str, Rows]) -> Table:
    """Returns a table of each run's last step, losses and speed."""
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


def _chance_lines(metrics: Sequence[str], accuracy: float) -> dict[str, float]:
    """Returns where each plot of an accuracy marks chance, by its label."""
    labels = [axis_label(metric) for metric in metrics]
    lines = {label: accuracy for label in labels if label.startswith(ACCURACY)}
    if not lines:
        raise ValueError(
            f"--chance={accuracy:g} needs a metric that is an accuracy, such as"
            f" --metrics=val_accuracy; the metrics are {', '.join(metrics)}"
        )
    return lines


def _level(curves: Sequence[Curve], height: float) -> Curve:
    """Returns a horizontal line over the steps of some curves."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    return Curve("chance", steps, np.full(len(steps), height))


def main(argv: Sequence[str]) -> None:
    """Draws the metrics of the runs that the arguments name."""
    if not argv[1:]:
        raise ValueError("expected one run folder or several, as in: plot runs/a runs/b")
    runs = read_runs(argv[1:])
    metrics = choose_metrics(runs, _METRICS.value)
    output = output_path("output", _OUTPUT.value)

    panels = {
        metric: [read_curve(rows, metric, label) for label, rows in runs.items()]
        for metric in metrics
    }
    chance = None if _CHANCE.value is None else _chance_lines(metrics, _CHANCE.value)
    if output:
        named = {axis_label(metric): curves for metric, curves in panels.items()}
        plot_curves(named, output, _SMOOTH.value, chance)
    console = Console(highlight=False, markup=False, emoji=False)
    for metric, curves in panels.items():
        if _SMOOTH.value:
            curves = [smooth(curve, _SMOOTH.value) for curve in curves]
        label = axis_label(metric)
        if chance and label in chance:
            curves = [*curves, _level(curves, chance[label])]
        draw_in_terminal(console, label, curves)
    print_table(summary_table(runs))
    if output:
        console.print(f"the picture is {visible(output)}", soft_wrap=True)
    else:
        console.print("give --output=FILE.png to write a picture")


if __name__ == "__main__":
    run(main)
