import os
import signal
import subprocess
import sys
import time

import pytest

from xlstm.tools import command_line
from xlstm.tools.command_line import print_error, print_note, resolve_path

_TOOL = f"""
import sys, time
from absl import flags
from {command_line.__name__} import run

_COUNT = flags.DEFINE_integer("count", 1, "How many.", lower_bound=0)
_NAME = flags.DEFINE_string("name", None, "Who.", required=True)

def main(argv):
    print(_COUNT.value, _NAME.value, argv[1:], flush=True)
    if _NAME.value == "value":
        raise ValueError("the count\\nis\\t wrong")
    if _NAME.value == "os":
        open("/no/such/file")
    if _NAME.value == "bug":
        raise KeyError("ours")
    if _NAME.value == "sleep":
        time.sleep(60)

def prepare(words):
    if "bad" in words:
        raise ValueError("bad word")
    return [word.replace("COUNT", "--count") for word in words]

run(main, prepare)
"""


def _command(words):
    return [sys.executable, "-c", _TOOL, *words]


def _run(*words):
    return subprocess.run(_command(words), capture_output=True, text=True, timeout=60)


def test_flags_and_arguments():
    result = _run("COUNT=3", "--name=me", "rest")
    assert (result.returncode, result.stdout) == (0, "3 me ['rest']\n"), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    "words, named",
    [
        (["--name=value"], "the count is wrong"),
        (["--name=os"], "No such file or directory: '/no/such/file'"),
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
    assert "Did you mean: count" in _run("--name=me", "--cuont=3").stderr


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
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted\n"


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
