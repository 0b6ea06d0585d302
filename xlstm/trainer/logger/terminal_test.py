import io
import re

from rich.console import Console

from xlstm.trainer.logger import terminal
from xlstm.trainer.logger.terminal import TerminalLogger

_ROW = {"loss": 2.34567, "tokens_per_second": 12345.6, "matmul_fraction": 0.376}


def _console(is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=150, highlight=False)


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


def test_evaluations_are_lines_that_stay():
    for is_terminal in (False, True):
        console = _console(is_terminal)
        logger = TerminalLogger(console, 0, 20)
        logger.log(
            10,
            {
                "val_loss": 1.2346,
                "val_perplexity": 3.437,
                "val_accuracy": 0.5,
                "val_bits_per_byte": 1.78,
            },
        )
        logger.close()
        assert "validation loss 1.2346  perplexity 3.44" in _text(console)
        assert re.search(r"step +10 ", _text(console))


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
    assert "loss 2.3457  12,346 tokens/s  38% of matmul rate" in last
    assert "━" in last and "left" in last
    assert "\x1b[?25h" in console.file.getvalue()  # The cursor is shown again.


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was():
    console = _console(is_terminal=True)
    logger = TerminalLogger(console, 15, 20)
    logger.progress(16)
    logger.close()
    assert "16/20" in _text(console)
    assert "0/20" not in _text(console)
