"""Tests of plots."""

import io
import json
import os
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from xlstm.testing.patience import PATIENCE
from xlstm.tools import plot
from xlstm.tools.plot import draw_in_terminal
from xlstm.trainer.logger.curves import Curve


def _curve(label, values, steps=None):
    steps = np.arange(len(values)) if steps is None else np.array(steps)
    return Curve(label, steps, np.array(values, np.float64))


def _draw(*curves, width=60, colors=False):
    system = "256" if colors else None
    console = Console(file=io.StringIO(), width=width, force_terminal=colors, color_system=system)
    draw_in_terminal(console, "loss", curves)
    return console.file.getvalue()


def _canvas(text):
    """Returns the rows between the axes, from top to bottom."""
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


def test_a_terminal_has_colors_and_finer_lines():
    text = _draw(_curve("a", [3.0, 1.0]), _curve("b", [1.0, 3.0]), _curve("c", []), colors=True)
    assert "\x1b[38;5;32m" in text and "\x1b[38;5;208m" in text
    assert re.search("[\u2801-\u28ff]", text)
    assert re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[-1].split() == ["━━", "a", "━━", "b"]


def test_ticks_are_round_numbers():
    text = _draw(_curve("a", [2.003, 2.011, 2.017], [0, 15_000, 120_000]), width=100)
    assert re.findall(r"^ *([0-9.]+)┤", text, re.MULTILINE) == ["2.015", "2.01", "2.005"]
    assert re.search(r"^ +0 +50,000 +100,000 *$", text, re.MULTILINE)


def test_long_curves_are_thinned_to_their_means():
    steps = np.arange(0, 100_000, 10)
    text = _draw(_curve("a", 2 + (steps // 10) % 2, steps))  # Alternates between 2 and 3.
    rows = [number for number, row in enumerate(_canvas(text)) if "*" in row]
    assert len(rows) <= 3  # The mean is about 2.5.


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0]], ids=str)
def test_what_does_not_change_is_drawn_too(values):
    assert sum("*" in row for row in _canvas(_draw(_curve("a", values)))) == 1


def _write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two runs, one of them with a torn last line, and of folders that are no runs."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"step": 0, "val_loss": 5.5}]
    for step in range(10, 1010, 10):
        rows.append({"step": step, "loss": 5 - step / 500, "tokens_per_second": 1000.0 + step})
    rows += [{"step": 500, "val_loss": 3.25}, {"step": 1000, "val_loss": 4.0, "val_loss_code": 2.0}]
    _write(folder / "a" / "metrics.jsonl", rows)
    _write(folder / "b" / "metrics.jsonl", rows[1:51])
    with open(folder / "b" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 510, "lo')
    _write(folder / "no_rows" / "metrics.jsonl", [])
    _write(folder / "no_numbers" / "metrics.jsonl", [{"step": 1, "loss": float("nan")}])
    (folder / "no_run").mkdir()
    return folder


def _plot(folder, *words):
    env = os.environ | {"BUILD_WORKING_DIRECTORY": str(folder), "COLUMNS": "100"}
    command = [sys.executable, "-m", plot.__name__, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)


@pytest.fixture(scope="module")
def drawn(folder):
    result = _plot(folder, "a", "b/metrics.jsonl", "a/", "--smooth=100", "--output=curves.png")
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_the_losses_of_all_runs_are_drawn_in_the_terminal(drawn):
    titles = [line.strip() for line in drawn.splitlines() if "(nats per token)" in line]
    assert titles == ["training loss (nats per token)", "validation loss (nats per token)"]
    legends = [line.split() for line in drawn.splitlines() if line.startswith("* ")]
    assert legends == [["*", "a", "+", "b"], ["*", "a"]]  # One has no validation loss.


def test_a_table_says_how_the_runs_do(drawn):
    lines = [line.split() for line in drawn.splitlines()]
    assert ["a", "1,000", "3.0000", "3.2500", "500", "1,505"] in lines
    assert ["b", "500", "4.0000", "1,255"] in lines


def test_the_picture_lies_where_the_user_called(folder, drawn):
    assert drawn.splitlines()[-1] == f"the picture is {folder / 'curves.png'}"
    assert matplotlib.image.imread(folder / "curves.png").ndim == 3


def test_without_output_no_file_is_written(folder):
    before = sorted(folder.rglob("*"))
    result = _plot(folder, "a", "b")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "give --output=FILE.png to write a picture"
    assert sorted(folder.rglob("*")) == before


def test_chance_is_a_line_in_the_plots_of_an_accuracy(folder):
    _write(
        folder / "parity" / "metrics.jsonl",
        [{"step": s, "val_loss": 1.0, "val_accuracy_lengths_1_40": s / 100} for s in (0, 50, 100)],
    )
    words = ["parity", "--metrics=val_accuracy_lengths_1_40,val_loss", "--chance=0.5"]
    result = _plot(folder, *words, "--output=parity.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert "accuracy, lengths 1-40" in result.stdout and "40%" in result.stdout
    legends = [line.split() for line in result.stdout.splitlines() if line.startswith("* ")]
    assert legends == [["*", "parity", "+", "chance"], ["*", "parity"]]


def test_metrics_and_the_picture_can_be_chosen(folder, monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(folder))
    runs = plot.read_runs(["a", "b"])
    assert plot.choose_metrics(runs, None) == ["loss", "val_loss"]
    assert plot.choose_metrics({"b": runs["b"]}, None) == ["loss"]
    chosen = ["val_loss_code", "loss", "val_loss_code"]
    assert plot.choose_metrics(runs, chosen) == ["val_loss_code", "loss"]


@pytest.mark.parametrize(
    "names, metrics, message",
    [
        (["c"], None, r"there is no .*c: expected a run folder, or its metrics\.jsonl"),
        (["a", "no_run"], None, r"there is no .*no_run.metrics\.jsonl"),
        (["no_rows"], None, r"no_rows.metrics\.jsonl has no rows yet"),
        (["no_numbers"], None, "nothing to draw in no_numbers"),
        (
            ["b", "a"],
            ["los", "loss"],
            "^--metrics=los: expected some of loss, tokens_per_second, val_loss, val_loss_code$",
        ),
        (["b"], [], "^--metrics=: expected some of loss, tokens_per_second$"),
    ],
)
def test_bad_input_is_named(folder, monkeypatch, names, metrics, message):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(folder))
    with pytest.raises(ValueError, match=message):
        plot.choose_metrics(plot.read_runs(names), metrics)


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "expected one run folder or several"),
        (["a", "--chance=0.5"], "--chance=0.5 needs a metric that is an accuracy"),
        (["a", "--output=none/x.png"], "--output=none/x.png: expected a file in a folder"),
    ],
    ids=["no run", "no accuracy", "no folder"],
)
def test_bad_input_is_one_line_and_status_2(folder, words, named):
    result = _plot(folder, *words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line
    assert result.stdout == ""


def test_what_others_named_is_shown_as_it_is(folder):
    rows = [{"step": s, "[red]\x1b[2J$x_": 1.0 + s, "note": "text", "big": 10**400} for s in (1, 2)]
    _write(folder / "[bold]c\u202e" / "metrics.jsonl", rows)
    result = _plot(folder, "[bold]c\u202e", "--metrics=[red]\x1b[2J$x_", "--output=odd.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert r"[red]\x1b[2J$x_" in result.stdout and r"[bold]c\u202e" in result.stdout
    assert "\x1b[2J" not in result.stdout and "\u202e" not in result.stdout
    result = _plot(folder, "[bold]c\u202e", "--metrics=note")
    assert result.returncode == 2 and "expected some of" in result.stderr
    assert r"[red]\x1b[2J$x_" in result.stderr and "\x1b" not in result.stderr
