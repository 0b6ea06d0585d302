import io
import re

import numpy as np
import pytest
from rich.console import Console

from xlstm.tools.terminal_plot import draw_in_terminal
from xlstm.trainer.logger.curves import Curve


def _curve(label, values, steps=None):
    steps = np.arange(len(values)) if steps is None else np.array(steps)
    return Curve(label, steps, np.array(values, np.float64))


def _draw(*curves, width=60, colours=False):
    system = "256" if colours else None
    console = Console(file=io.StringIO(), width=width, force_terminal=colours, color_system=system)
    draw_in_terminal(console, "loss", curves)
    return console.file.getvalue()


def _canvas(text):
    """What stands between the axes, top row first."""
    return [row[1] for line in text.splitlines() if (row := re.search("[│┤](.*)│$", line))]


@pytest.mark.parametrize("width", [40, 130])
def test_it_is_as_wide_as_the_terminal_with_title_and_legend(width):
    text = _draw(_curve("runs/a", [3.0, 2.0]), _curve("runs/b", [2.0, 3.0]), width=width)
    title, *drawing, step, legend = [line for line in text.splitlines() if line.strip()]
    assert (title.strip(), step.strip()) == ("loss", "step")
    assert legend.split() == ["*", "runs/a", "+", "runs/b"]
    assert {len(line) for line in drawing} == {width}


def test_curves_are_where_their_values_are():
    text = _draw(_curve("a", [3.0, 2.0, 1.0]), _curve("b", [1.0, 2.0, 3.0]))
    canvas = _canvas(text)
    assert canvas[0].startswith("*") and canvas[0].endswith("+")
    assert canvas[-1].startswith("+") and canvas[-1].endswith("*")
    assert all(set(row) > {" "} for row in canvas)  # Points are joined by lines.
    assert "\x1b" not in text


def test_a_terminal_has_colours_and_finer_lines():
    text = _draw(_curve("a", [3.0, 1.0]), _curve("b", [1.0, 3.0]), _curve("c", []), colours=True)
    assert "\x1b[38;5;32m" in text and "\x1b[38;5;208m" in text
    assert re.search("[\u2801-\u28ff]", text)
    assert re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[-1].split() == ["━━", "a", "━━", "b"]


def test_ticks_are_round_numbers():
    text = _draw(_curve("a", [2.003, 2.011, 2.017], [0, 15_000, 120_000]), width=100)
    assert re.findall(r"^ *([0-9.]+)┤", text, re.MULTILINE) == ["2.015", "2.01", "2.005"]
    assert re.search(r"^ +0 +50,000 +100,000 *$", text, re.MULTILINE)


def test_long_curves_are_thinned_to_their_means():
    steps = np.arange(0, 100_000, 10)
    text = _draw(_curve("a", 2 + (steps // 10) % 2, steps))  # In turns 2 and 3.
    rows = [number for number, row in enumerate(_canvas(text)) if "*" in row]
    assert len(rows) <= 3  # In the middle, about 2.5.


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0]], ids=str)
def test_what_does_not_change_is_drawn_too(values):
    assert sum("*" in row for row in _canvas(_draw(_curve("a", values)))) == 1
