"""Metrics over steps as curves, and curves as a picture."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm.files import write_atomically
from xlstm.visible_text import visible

_MOST_MARKED = 60  # Points of a curve up to which each is marked.


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values of a metric.

    Attributes:
        label: What the legend calls it.
        steps: Steps, ascending, (N,).
        values: The finite values there, (N,).
    """

    label: str
    steps: np.ndarray
    values: np.ndarray


def is_point(value: Any) -> bool:
    """Whether what a row has for a metric is a number that can be drawn."""
    is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return is_number and math.isfinite(value)


def read_curve(rows: Sequence[dict[str, float]], metric: str, label: str) -> Curve:
    """Picks one metric; rows without it, and values that are not finite, are left out.

    Args:
        rows: Rows of a metrics file.
        metric: The key.
        label: What to call the curve.

    Returns:
        The curve, which may have no points.
    """
    points = [(row["step"], row[metric]) for row in rows if is_point(row.get(metric))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Curve(label, steps.astype(np.int64), values)


def smooth(curve: Curve, num_steps: int) -> Curve:
    """Replaces every value by the mean of the values of the last `num_steps` steps up to it.

    So a metric that is there less often than that, such as a validation loss, stays as it is.

    Args:
        curve: Any curve.
        num_steps: At least 1.

    Returns:
        A curve with the same steps.
    """
    if not len(curve.steps):
        return curve
    ends = np.searchsorted(curve.steps, curve.steps, side="right")
    begins = np.searchsorted(curve.steps, curve.steps - num_steps, side="right")
    # Each sum on its own: in differences of running sums a single spike would drown what follows.
    between = np.stack([begins, ends], axis=1).ravel()
    sums = np.add.reduceat(np.append(curve.values, 0.0), between)[::2]
    return dataclasses.replace(curve, values=sums / (ends - begins))


def draw_picture(
    panels: Mapping[str, Sequence[Curve]], path: str, smooth_steps: int | None = None
) -> None:
    """Draws curves over steps, panel above panel.

    Args:
        panels: For the name of each vertical axis its curves; those without points are left out.
        path: The PNG file to write.
        smooth_steps: Draws means over so many steps, and what they are of pale behind them.
    """
    # Imported here, since it takes a while and the first steps of a run can do without.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 3.5 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        for number, curve in enumerate(curves):
            if not len(curve.steps):
                continue
            colour = f"C{number % 10}"
            if smooth_steps is not None:
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.25)
                curve = smooth(curve, smooth_steps)
            marker = "o" if len(curve.steps) <= _MOST_MARKED else None
            style = {"linewidth": 1.2, "marker": marker, "markersize": 3}
            axes.plot(curve.steps, curve.values, color=colour, label=visible(curve.label), **style)
        axes.set_ylabel(visible(name), parse_math=False)  # A $ is no formula.
        axes.grid(alpha=0.3)
        if axes.lines:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)
    all_axes[-1].set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
