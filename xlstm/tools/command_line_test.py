import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from xlstm.testing.patience import PATIENCE
from xlstm.tools import command_line
from xlstm.tools.command_line import print_error, print_note, resolve_path

_TOOL = f"""
'''Counts.

    tool --name=me
'''
import os, sys, tempfile, time
from absl import flags
from rich.console import Console
from rich.table import Table
from {command_line.__name__} import print_table, run

_COUNT = flags.DEFINE_integer("count", 1, "How many.", lower_bound=0)
_NAME = flags.DEFINE_string("name", None, "Who.", required=True)
_KIND = flags.DEFINE_enum("kind", "a", ["a", "b"], "Which kind.")
_LOUD = flags.DEFINE_bool("loud", False, "Prints louder, and so on for a text that is longer"
                          " than one line of the help, which has 100 characters.")

def main(argv):
    if _NAME.value != "unflushed":
        print(_COUNT.value, _NAME.value, argv[1:], flush=True)
    if _NAME.value == "value":
        raise ValueError("the count\\nis\\t wrong")
    if _NAME.value == "os":
        open("/no/such/file")
    if _NAME.value == "kernel":
        raise RuntimeError("INTERNAL: Mosaic GPU pass pipeline failed: ptxas exited\\n\\n")
    if _NAME.value == "bug":
        raise KeyError("ours")
    if _NAME.value == "sleep":
        time.sleep(60)
    if _NAME.value == "unflushed":
        print("x")
    if _NAME.value == "lines":
        for _ in range(100_000):
            print("a line")
        print("the end", file=sys.stderr)
    if _NAME.value == "rich":
        for _ in range(10_000):
            Console().print("a line")
    if _NAME.value == "table":
        table = Table("a", "[b]")
        table.add_row("word " * 60, "[red]")
        print_table(table)
    if _NAME.value == "file":
        with tempfile.NamedTemporaryFile() as file:
            os.write(file.fileno(), b"text")
            os.write(2, b"what a library says")
            print("the file has", os.path.getsize(file.name), "bytes")

def prepare(words):
    if "bad" in words:
        raise ValueError("bad word")
    return [word.replace("COUNT", "--count") for word in words]

run(main, prepare, outlives_output="outlive" in sys.argv)
"""


def _command(words):
    return [sys.executable, "-c", _TOOL, *words]


def _run(*words):
    env = os.environ | {"COLUMNS": "100"}
    return subprocess.run(
        _command(words), capture_output=True, text=True, timeout=PATIENCE, env=env
    )


def test_flags_and_arguments():
    result = _run("COUNT=3", "--name=me", "rest")
    assert (result.returncode, result.stdout) == (0, "3 me ['rest']\n"), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    "words, named",
    [
        (["--name=value"], "the count is wrong"),
        (["--name=os"], "No such file or directory: '/no/such/file'"),
        (["--name=kernel"], "ptxas exited); set backend.implementation=xla"),
        (["--name=me", "bad"], "bad word"),
        (["--name=me", "--cuont=3"], "cuont"),
        (["--name=me", "--count=x"], "count"),
        (["--name=me", "--count=-1"], "count"),
        ([], "name"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_2(words, named):
    result = _run(*words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line


def test_a_typo_is_answered_with_a_suggestion():
    error = "error: there is no flag --cuont; did you mean --count?\n"
    assert _run("--name=me", "--cuont=3").stderr == error
    assert _run("--name=me", "--zz").stderr == "error: there is no flag --zz; see --help\n"


@pytest.mark.parametrize("word", ["--help", "-h", "--helpfull"])
def test_help_lists_all_flags_of_the_project_and_succeeds(word):
    result = _run("--name=me", word, "bad")
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        result.stdout
        == """Counts.

    tool --name=me

Flags:
  --count=NUMBER (default: 1)
      How many.
  --name=TEXT
      Who.
  --kind=a|b (default: a)
      Which kind.
  --[no]loud
      Prints louder, and so on for a text that is longer than one line of the help, which has 100
      characters.
"""
    )


def test_a_word_behind_the_flags_is_no_call_for_help():
    assert _run("--name=me", "--", "--help").stdout == "1 me ['--help']\n"


def test_our_own_errors_show_where():
    result = _run("--name=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "KeyError: 'ours'" in result.stderr


def test_ctrl_c_is_no_error_of_ours():
    process = subprocess.Popen(
        _command(["--name=sleep"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == "interrupted\n"


def _shell(command):
    """Runs a line of a shell, with the tool in place of TOOL."""
    tool = f"{shlex.quote(sys.executable)} -c {shlex.quote(_TOOL)}"
    return subprocess.run(
        ["bash", "-c", command.replace("TOOL", tool)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("name", ["lines", "rich"])
def test_without_a_reader_a_tool_ends_as_others_do(name):
    result = _shell(f"TOOL --name={name} | head -1; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")
    assert result.stdout.count("\n") == 1


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")


@needs_full
def test_a_full_disk_under_the_output_is_an_error():
    result = _shell("TOOL --name=unflushed > /dev/full")
    assert (result.returncode, result.stderr) == (2, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("where", [">&-", pytest.param("> /dev/full", marks=needs_full)])
def test_an_error_that_cannot_be_shown_has_its_status(where):
    where = f"{where} 2{where}"
    assert _shell(f"TOOL --name=value {where}").returncode == 2
    assert _shell(f"TOOL --name=me --count=x {where}").returncode == 2


def test_no_file_takes_the_place_of_a_closed_stream():
    result = _shell("TOOL --name=file <&- 2>&-")
    assert (result.returncode, result.stdout) == (0, "1 file []\nthe file has 4 bytes\n")


@needs_full
def test_a_tool_that_outlives_its_output_tells_so():
    for command in ("TOOL outlive --name=lines | head -1", "TOOL outlive --name=lines > /dev/full"):
        result = _shell(f"{command}; exit ${{PIPESTATUS[0]}}")
        assert result.returncode == 0
        assert result.stderr.count("the standard output cannot be written (") == 1
        assert result.stderr.endswith("the end\n") and result.stderr.count("\n") == 2


def test_the_lines_of_a_table_stay_whole_in_a_pipe():
    lines = _run("--name=table").stdout.splitlines()
    (row,) = [line for line in lines if "word" in line]
    assert row.count("word") == 60 and "[red]" in row and any("[b]" in line for line in lines)


def test_paths_start_where_the_user_is(monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", "/home/someone")
    assert resolve_path("runs/a") == "/home/someone/runs/a"
    assert resolve_path("../a") == "/home/a"
    assert resolve_path("/runs/a") == "/runs/a"
    monkeypatch.delenv("BUILD_WORKING_DIRECTORY")
    assert resolve_path("runs/a") == os.path.join(os.getcwd(), "runs", "a")


def test_what_others_wrote_is_shown_as_it_is(capsys):
    text = "\x1b]0;title\x07 \u202ereversed\n\x9b2J\udc80\x1c é[red]"
    print_error(text)
    print_note(text)
    shown = r"\x1b]0;title\x07 \u202ereversed \x9b2J\udc80 é[red]"
    assert capsys.readouterr().err == f"error: {shown}\nnote: {shown}\n"


_SLOW_IMPORTS = f"""
import time
from {command_line.__name__} import announce_start, run
announce_start("tool: loading", always=True)
time.sleep(60)
"""


def test_a_tool_speaks_before_its_slow_imports_and_ctrl_c_ends_them_quietly():
    command = [sys.executable, "-c", _SLOW_IMPORTS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "tool: loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1] == ""
    assert process.returncode == -signal.SIGINT


def test_a_tool_whose_output_is_for_programs_speaks_to_terminals_alone():
    script = _SLOW_IMPORTS.replace(", always=True", "").replace("60", "0")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
