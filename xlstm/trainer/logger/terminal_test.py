import io
import re
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.logger import terminal
from xlstm.trainer.logger.terminal import (
    TerminalLogger,
    mesh_line,
    unused_accelerator_line,
)

_ROW = {"loss": 2.34567, "tokens_per_second": 12345.6, "matmul_fraction": 0.376}


def _console(is_terminal, width=150):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, highlight=False)


def _text(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_without_a_terminal_lines_are_printed_now_and_then(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    console = _console(is_terminal=False)
    logger = TerminalLogger(console, 0, 2000)
    for step in range(1, 1001):
        logger.progress(step)
        logger.log(step, _ROW)
        now[0] += 0.03
    logger.close()
    lines = _text(console).splitlines()
    assert 2 <= len(lines) <= 4  # Half a minute: not a line for each of a thousand rows.
    assert re.fullmatch(
        r"step +1 of 2,000  loss 2\.3457  12,346 tokens/s  38% of matmul rate", lines[0]
    )
    assert "\x1b" not in console.file.getvalue()


_EVALUATION = {
    "val_loss": 1.2346,
    "val_perplexity": 3.437,
    "val_accuracy": 0.5,
    "val_bits_per_byte": 1.78,
}


def test_evaluations_are_lines_that_stay():
    for is_terminal in (False, True):
        console = _console(is_terminal)
        logger = TerminalLogger(console, 0, 20)
        logger.log(10, _EVALUATION)
        logger.close()
        line = "step      10  validation: loss 1.2346  perplexity 3.44  accuracy 50.00%"
        assert f"{line}  bits/byte 1.780\n" in _text(console)


def test_each_validation_set_is_named_in_front_of_its_figures():
    console = _console(is_terminal=False)
    logger = TerminalLogger(console, 0, 20)
    named = {f"{key}_wiki": value for key, value in _EVALUATION.items()}
    logger.log(10, _EVALUATION | named)
    lines = _text(console).splitlines()
    assert [line.partition(": loss")[0] for line in lines] == [
        "step      10  validation",
        "step      10  validation wiki",
    ]


def test_lines_stay_whole_in_a_file_of_any_width():
    console = _console(is_terminal=False, width=40)
    logger = TerminalLogger(console, 0, 2000)
    logger.log(10, _EVALUATION)
    logger.log(10, _ROW)
    assert len(_text(console).splitlines()) == 2


def test_a_terminal_shows_a_bar_with_loss_and_speed():
    console = _console(is_terminal=True)
    logger = TerminalLogger(console, 0, 20)
    assert _text(console) == ""
    for step in range(1, 21):
        logger.progress(step)
        logger.log(step, _ROW)
    logger.close()
    text = _text(console)
    last = text.splitlines()[-1]
    assert "20/20" in last
    assert "loss 2.3457  12,346 tok/s  38% of matmul rate" in last
    assert "━" in last and "elapsed" in last
    assert "\x1b[?25h" in console.file.getvalue()  # The cursor is shown again.


def _last_bar(width, num_steps, now):
    console = _console(is_terminal=True, width=width)
    console.get_time = lambda: now[0]
    logger = TerminalLogger(console, 0, num_steps)
    for step in (1, 2, 3):
        now[0] += 2.0
        logger.progress(step)
        logger.log(step, _ROW)
    logger.close()
    lines = [line.strip("\r") for line in _text(console).splitlines()]
    assert all(len(line) <= width for line in lines)
    return lines[-1]


def test_the_bar_fits_narrow_terminals():
    for width, parts in {
        60: ["step 3/2,000 ━", "loss 2.3457", "12,346 tok/s", " left"],
        80: ["step 3/2,000 ━", "loss 2.3457", "12,346 tok/s", " elapsed", " left"],
        110: ["12,346 tok/s", "38% of matmul rate", " elapsed", " left"],
    }.items():
        line = _last_bar(width, 2000, [0.0])
        positions = [line.find(part) for part in parts]
        assert -1 not in positions and positions == sorted(positions), line
    line = _last_bar(60, 1_000_000, [0.0])
    assert "step 3/1,000,000" in line and "loss 2.3457" in line and " left" in line


def test_a_time_that_is_not_known_yet_is_left_out():
    console = _console(is_terminal=True, width=100)
    logger = TerminalLogger(console, 0, 20)
    logger.progress(1)
    logger.close()
    assert "left" not in _text(console) and "-:--" not in _text(console)


def test_the_mesh_is_one_line():
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh_line(mesh) == "mesh: dp=1, fsdp=1, pp=1, cp=1, tp=1 (1 CPU device)"


@pytest.fixture
def unused(monkeypatch):
    """The line with some of JAX's platforms and one package, on a device of some platform."""

    def line(platforms=None, package="jax", platform="cpu"):
        monkeypatch.setattr(terminal, "_ACCELERATORS", {"no_such": "", package: "the cable"})
        device = types.SimpleNamespace(platform=platform)
        before = jax.config.jax_platforms
        try:
            jax.config.update("jax_platforms", platforms)
            return unused_accelerator_line(
                types.SimpleNamespace(devices=np.array([[device]], object))
            )
        finally:
            jax.config.update("jax_platforms", before)

    return line


def test_an_accelerator_that_jax_does_not_use_is_one_line(unused):
    assert unused() == (
        "jax is installed, but JAX uses the CPU: check the cable, and JAX_PLATFORMS, which is not"
        " set ('cpu' hides this line)"
    )
    assert "JAX_PLATFORMS, which is cuda,cpu (" in unused("cuda,cpu")


@pytest.mark.parametrize(
    "options",
    [{"platforms": "cpu"}, {"platforms": "cpu,cuda"}, {"package": "nor_this"}, {"platform": "gpu"}],
    ids=str,
)
def test_what_is_asked_for_or_used_needs_no_line(unused, options):
    assert unused(**options) == ""


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was():
    console = _console(is_terminal=True)
    logger = TerminalLogger(console, 15, 20)
    logger.progress(16)
    logger.close()
    assert "16/20" in _text(console)
    assert "0/20" not in _text(console)
