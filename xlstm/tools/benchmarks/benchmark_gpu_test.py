import json
import os
import subprocess
import sys
import types

import pytest
from absl import flags
from absl.testing import flagsaver

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


DRY = gpu_groups.Setting(PATIENCE, dry_run=True)


def test_a_dry_run_interprets_the_kernels_if_it_can(monkeypatch):
    for can_interpret, programs in ((True, ["mosaic", "xla"]), (False, ["xla"])):
        monkeypatch.setattr(gpu_groups, "CAN_INTERPRET", can_interpret)
        assert (DRY.cells, DRY.models) == (programs, ["xla"])
        on_a_card = DRY._replace(dry_run=False)
        assert on_a_card.cells == on_a_card.models == ["mosaic", "xla"]


def test_a_dry_run_of_the_kernels(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", benchmark_gpu.__name__]
        + ["--dry_run", "--groups=target", "--json=rows.json"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "BUILD_WORKING_DIRECTORY": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count("cannot interpret the kernels") == (not gpu_groups.CAN_INTERPRET)
    rows = json.loads((tmp_path / "rows.json").read_text())
    timed = [(row["program"], row["what"]) for row in rows if row.get("chunk_size") == 64]
    passes = ("1x1x64x8x16, forward", "1x1x64x8x16, forward + backward")
    assert timed == [(program, name) for program in DRY.cells for name in passes]
    for row in rows:
        assert row["group"] == "target" and row["device"] == "cpu"
        if row.get("chunk_size") == 64:
            assert 0 < row["of_sheet"] < 1 and row["of_measured"] > 0
            assert f"{row['ms']:,.3f}" in result.stdout
    assert rows[-1]["result"].startswith("not timed: --peers=mlstm_kernels needs")


def test_a_dry_run_of_the_tests():
    (row,) = gpu_groups.tests(DRY)
    assert row["ok"] and " passed in " in row["result"]


def test_steps_of_all_programs_are_timed(monkeypatch):
    """The first program fails."""
    figures = dict.fromkeys(["step_median_ms", "step_min_ms", "compile_s"], 2.0)
    figures |= {"temporary_memory_mib": 3.0, "tokens_per_s": 4e3}

    def time_train_step(config, repeats, advance):
        timed.append((config.data.batch_size, config.backend.implementation))
        if config.backend.implementation == "mosaic":
            raise RuntimeError("no kernel")
        return figures

    timed = []
    monkeypatch.setattr(gpu_groups, "time_train_step", time_train_step)
    failed, row = gpu_groups.steps_400m(DRY._replace(dry_run=False))
    assert timed == [(16, "mosaic"), (16, "xla")]
    assert (failed["program"], failed["ok"]) == ("mosaic", False)
    assert failed["result"] == "FAILED RuntimeError: no kernel"
    assert (row["program"], row["ms"], row["result"]) == ("xla", 2.0, "4,000 tokens/s")
    assert row["what"] == failed["what"] == "training step, xlstm:400M"
    (row,) = gpu_groups.steps_400m(DRY)
    assert (row["program"], row["what"]) == ("xla", "training step, smoke")


@pytest.mark.parametrize(
    "words, named",
    [
        (["--groups=check,speed"], "--groups=speed is unknown; expected some of check, tests"),
        (["--json=none/x.json"], "--json=none/x.json: expected a file in a folder that exists"),
        (["now"], "unexpected arguments: now"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, monkeypatch, capfd, words, named):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    with flagsaver.flagsaver(), pytest.raises(ValueError) as caught:
        benchmark_gpu.main(flags.FLAGS(["benchmark_gpu", *words]))
    assert named in str(caught.value)
    assert capfd.readouterr() == ("", "")
