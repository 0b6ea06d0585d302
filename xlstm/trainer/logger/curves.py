"""Curves of metrics over steps, and plots of them."""

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm.files import write_atomically
from xlstm.visible_text import visible

_MAX_MARKED = 60  # Mark every point of curves that have no more points.
ACCURACY = "accuracy"  # Begins the labels of axes that are shown in percent.
_LABELS = {
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_perplexity": "validation perplexity",
    "val_accuracy": ACCURACY,
    "val_bits_per_byte": "validation bits per byte",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
    "update_norm": "update norm",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_device": "tokens/s per device",
    "matmul_fraction": "share of matmul rate",
    "mfu": "model FLOP utilization",
    "goodput": "goodput (share of time in steps)",
    "peak_memory": "peak memory of the process (GiB)",
    "peak_device_memory": "peak memory of a device (GiB)",
    "skipped_steps": "skipped steps",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over steps.

    Attributes:
        label: Name in the legend.
        steps: Steps in ascending order, `(N,)` int64.
        values: Finite values at these steps, `(N,)` float64.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray


def is_point(value: Any) -> bool:
    """Returns whether a value in a metrics file is a number that can be plotted."""
    is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return is_number and math.isfinite(value)


def read_curve(rows: Sequence[dict[str, float]], metric: str, label: str) -> Curve:
    """Extracts the curve of a metric, without rows that lack it and values that are not finite.

    Args:
        rows: Rows of a metrics file.
        metric: The key of the metric.
        label: Name in the legend.

    Returns:
        The curve, which may have no points.
    """
    points = [(row["step"], row[metric]) for row in rows if is_point(row.get(metric))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Curve(label, steps.astype(np.int64), values)


def axis_label(metric: str) -> str:
    """Returns a readable label for a key of the metrics; the key itself if it is not known.

    Args:
        metric: The key. A validation set's name may follow that of a validation metric.
    """
    # The longest key first: `val_loss_wiki` begins with `val_loss`.
    for key in sorted(_LABELS, key=len, reverse=True):
        if metric == key:
            return _LABELS[key]
        if key.startswith("val_") and metric.startswith(f"{key}_"):
            name = metric.removeprefix(f"{key}_")
            # A task names its sets after the lengths of their examples.
            name = re.sub(r"^lengths_([0-9]+)_\1$", r"length \1", name)
            name = re.sub("^lengths_([0-9]+)_([0-9]+)$", r"lengths \1-\2", name)
            return f"{_LABELS[key]}, {name}"
    return metric


def smooth(curve: Curve, num_steps: int) -> Curve:
    """Replaces every value by the mean over the last `num_steps` steps.

    A metric that is logged less often, such as a validation loss, stays as it is.

    Args:
        curve: The curve.
        num_steps: Size of the window, at least 1.

    Returns:
        A curve with the same steps.
    """
    if not len(curve.steps):
        return curve
    ends = np.searchsorted(curve.steps, curve.steps, side="right")
    begins = np.searchsorted(curve.steps, curve.steps - num_steps, side="right")
    # Separate sums: in differences of running sums one spike would swamp all later values.
    between = np.stack([begins, ends], axis=1).ravel()
    sums = np.add.reduceat(np.append(curve.values, 0.0), between)[::2]
    return dataclasses.replace(curve, values=sums / (ends - begins))


def plot_curves(
    panels: Mapping[str, Sequence[Curve]],
    path: str,
    smooth_steps: int | None = None,
    chance: Mapping[str, float] | None = None,
) -> None:
    """Plots curves over steps, one panel above the other, into a PNG file.

    Args:
        panels: The curves of each panel, by the label of its vertical axis. Curves without points
            are left out.
        path: The PNG file to write.
        smooth_steps: Draws means over this many steps, and the values in pale behind them.
        chance: The height of a horizontal line that marks chance, by the panel's label.
    """
    # A slow import, which delays no run: plots are drawn after the first steps.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 1 + 3.5 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        for number, curve in enumerate(curves):
            if not len(curve.steps):
                continue
            color = f"C{number % 10}"
            if smooth_steps is not None:
                axes.plot(curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.25)
                curve = smooth(curve, smooth_steps)
            marker = "o" if len(curve.steps) <= _MAX_MARKED else None
            style = {"linewidth": 1.2, "marker": marker, "markersize": 3}
            axes.plot(curve.steps, curve.values, color=color, label=visible(curve.label), **style)
        height = (chance or {}).get(name)
        if height is not None:
            axes.axhline(height, color="0.4", linestyle="--", linewidth=1.0, label="chance")
        if name.startswith(ACCURACY):
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.set_ylabel(visible(name), parse_math=False)  # A $ starts no formula.
        axes.grid(alpha=0.3)
        if axes.lines:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)
    all_axes[-1].set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
