"""Curves as characters in the terminal."""

from collections.abc import Sequence

import numpy as np
import plotext
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.text import Text

from xlstm.trainer.logger.curves import Curve
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
