import json
import os
import subprocess
import sys
import types

import pytest

from xlstm.testing.patience import PATIENCE, wait_until
from xlstm.tools.benchmarks import benchmark_gpu, gpu_groups

# Stands for `gpu_groups`: the name of a group is what it does.
FAKE_GROUPS = """
import os, subprocess, sys, time

name, rows, seconds, *dry_run = sys.argv[1:]
with open(rows, "a") as file:
    file.write('{"group": "%s", "what": "started"}\\n' % name)
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(rows + ".pid", "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)
"""


@pytest.fixture
def run_stage(tmp_path, monkeypatch):
    """Runs groups of `FAKE_GROUPS`; returns the rows that they left."""
    (tmp_path / "fake_groups.py").write_text(FAKE_GROUPS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(benchmark_gpu, "gpu_groups", types.SimpleNamespace(__name__="fake_groups"))
    groups = {
        name: gpu_groups.Group(lambda setting: (), seconds)
        for name, seconds in (("ends", PATIENCE), ("crashes", PATIENCE), ("hangs", 5.0))
    }
    monkeypatch.setattr(benchmark_gpu, "GROUPS", groups)

    def run(*names, seconds=PATIENCE, least=1.0):
        monkeypatch.setattr(benchmark_gpu, "_LEAST_SECONDS", least)
        path = tmp_path / "rows.jsonl"
        benchmark_gpu.run_stage(names, str(path), seconds, dry_run=False)
        lines = path.read_text().splitlines() if path.exists() else []
        return [(row["group"], row.get("result", "")) for row in map(json.loads, lines)]

    return run


def test_a_group_that_hangs_or_crashes_leaves_the_others_alone(run_stage, tmp_path):
    rows = run_stage("hangs", "crashes", "ends")
    assert sorted(rows) == [
        ("crashes", ""),
        ("crashes", "FAILED with exit status -6"),
        ("ends", ""),
        ("hangs", ""),
        ("hangs", "stopped at its limit of 5 s"),
    ]
    child = int((tmp_path / "rows.jsonl.pid").read_text())
    wait_until(lambda: _has_ended(child))


def _has_ended(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] in ("", "Z")  # A zombie stays until its parent collects it.


def test_a_group_that_no_longer_fits_is_skipped(run_stage):
    assert run_stage("ends", seconds=3.0, least=20.0) == [("ends", "skipped: 3 s are left")]


def test_rows_of_a_failing_group_say_what_failed(tmp_path, monkeypatch, capsys):
    def fails(setting):
        yield {"what": "first", "ms": 1.5, "result": "fine"}
        raise RuntimeError(f"in {setting.dry_run}")

    monkeypatch.setitem(gpu_groups.GROUPS, "fails", gpu_groups.Group(fails, 1.0))
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit):
        gpu_groups.run_group("fails", str(path), gpu_groups.Setting(1.0, dry_run=True))
    first, last = map(json.loads, path.read_text().splitlines())
    assert (first["group"], first["ms"]) == ("fails", 1.5) and first["jax_version"]
    assert last["result"] == "FAILED RuntimeError: in True" and last["ok"] is False
    assert "first; 1.500 ms; fine" in capsys.readouterr().out


def test_the_best_peer_is_named():
    def row(name, program, chunk_size, ms):
        return {"pass": name, "program": program, "chunk_size": chunk_size, "ms": ms, "what": name}

    peer = "mlstm_kernels triton"
    forward = [row("forward", "mosaic", 64, 2.0), row("forward", peer, 64, 7.0)]
    forward += [row("forward", peer, 128, 5.0), {"what": "x", "program": peer, "ok": False}]
    backward = [row("forward_backward", peer, 64, 9.0)]  # Ours has failed.
    (compared,) = gpu_groups.compare_with_peers(forward + backward)
    assert compared["result"] == f"2.50 times as fast as {peer}, chunk 128"
    assert (compared["what"], compared["program"]) == ("forward", "mosaic")


def test_every_group_is_in_one_stage():
    names = [name for stage in benchmark_gpu._STAGES for name in stage]
    assert sorted(names) == sorted(gpu_groups.GROUPS)


def start(folder, *words):
    """Runs the tool as a user in `folder` would."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", benchmark_gpu.__name__, *words],
        env={**os.environ, "PYTHONPATH": path, "BUILD_WORKING_DIRECTORY": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_dry_run_times_the_xla_program(tmp_path):
    result = start(tmp_path, "--dry_run", "--groups=target,tests,400M", "--json=rows.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_what = {(row["group"], row["what"]): row for row in rows}
    forward = by_what["target", "1x2x64x8x16, forward"]
    assert (forward["program"], forward["chunk_size"]) == ("xla", 64)
    assert 0 < forward["of_sheet"] < 1 and forward["of_measured"] > 0 and forward["ms"] > 0
    assert by_what["target", "1x2x64x8x16, forward + backward"]["ms"] > 0
    assert "not timed: --peers=mlstm_kernels needs" in by_what["target", "1x2x64x8x16"]["result"]
    assert " tokens/s" in by_what["400M", "training step, smoke"]["result"]
    tests = by_what["tests", "tests of the backends"]
    assert tests["ok"] and " passed in " in tests["result"]
    assert f"{forward['ms']:,.3f}" in result.stdout


@pytest.mark.parametrize(
    "words, named",
    [
        (["--groups=check,speed"], "--groups=speed is unknown; expected some of check, tests"),
        (["--json=none/x.json"], "--json=none/x.json: expected a file in a folder that exists"),
        (["now"], "unexpected arguments: now"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, words, named):
    result = start(tmp_path, *words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line
