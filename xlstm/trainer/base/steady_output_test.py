import contextlib
import os
import pty

import pytest

from xlstm.trainer.base import steady_output
from xlstm.trainer.base.steady_output import is_output_lost, make_steady


@pytest.fixture(autouse=True)
def files(monkeypatch):
    """No streams of other tests."""
    monkeypatch.setattr(steady_output, "_files", [])


@pytest.fixture
def pipe():
    """The ends of a pipe: a descriptor to read from, and a stream."""
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream:
        yield reader, stream


def test_what_can_be_written_is(pipe):
    reader, stream = pipe
    steady = make_steady(stream)
    text = "ü" * 20_000  # Several pieces.
    print(text, file=steady, flush=True)
    assert os.read(reader, 100_000).decode() == text + "\n"
    assert steady.fileno() == stream.fileno() and not steady.isatty()
    assert not is_output_lost()


def test_a_pipe_without_a_reader_is_told_once(pipe):
    reader, stream = pipe
    reasons = []
    steady = make_steady(stream, reasons.append)
    os.close(reader)
    for _ in range(3):
        print("x" * 10_000, file=steady, flush=True)
    assert reasons == ["Broken pipe"]
    assert is_output_lost()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_when_a_disk_has_room_again_it_goes_on(tmp_path):
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    full, own = os.open("/dev/full", os.O_WRONLY), os.dup(log.fileno())
    reasons = []
    steady = make_steady(log, reasons.append)
    for descriptor, text in ((full, "lost"), (own, "there"), (full, "lost again"), (own, "end")):
        os.dup2(descriptor, log.fileno())
        print(text, file=steady, flush=True)
        assert is_output_lost() == (descriptor == full)
    assert (tmp_path / "log").read_text() == "there\nend\n"
    assert reasons == ["No space left on device"] * 2


def test_a_reader_that_does_not_read_holds_nobody_up(pipe, monkeypatch):
    monkeypatch.setattr(steady_output, "_PATIENCE", 0.1)
    reader, stream = pipe
    reasons = []
    steady = make_steady(stream, reasons.append)
    print("x" * 1_000_000, file=steady, flush=True)
    assert reasons == ["nobody reads it"]
    # Once it reads it is shown what comes then.
    os.set_blocking(reader, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 65536):
            pass
    print("again", file=steady, flush=True)
    assert os.read(reader, 65536).endswith(b"again\n")
    assert not is_output_lost()


def test_a_terminal_that_nobody_reads_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(steady_output, "_PATIENCE", 0.1)
    terminal, own = pty.openpty()
    with open(own, "w") as stream:
        reasons = []
        steady = make_steady(stream, reasons.append)
        # More than it has room for, in pieces that fit and in one that does not.
        for text in ["x" * 100] * 1000 + ["y" * 100_000]:
            print(text, file=steady, flush=True)
        assert reasons == ["nobody reads it"] and is_output_lost()
        assert os.get_blocking(stream.fileno())
        # Once it is read it shows what comes then.
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(terminal, 65536):
                pass
        print("again", file=steady, flush=True)
        assert os.read(terminal, 65536).endswith(b"again\r\n")
        assert not is_output_lost()
    os.close(terminal)


def test_a_terminal_that_is_closed():
    terminal, own = pty.openpty()
    with open(own, "w") as stream:
        steady = make_steady(stream)
        assert steady.isatty()
        os.close(terminal)
        print("x", file=steady, flush=True)
        assert is_output_lost()


def test_a_character_that_the_encoding_lacks_is_no_error(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as stream:
        print("─", file=make_steady(stream), flush=True)
    assert (tmp_path / "log").read_text() == "\\u2500\n"
