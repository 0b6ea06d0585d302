"""Tests of bad input and a full disk, as a user of the tool meets them."""

import json
import os
import re
import resource
import shutil
import time

import pytest

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE, wait_until
from xlstm.tools import train
from xlstm.tools.testing.start_tool import start_tool
from xlstm.trainer.checkpoints.folder import CheckpointFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with good and bad token stores, and a run of ten steps."""
    folder = tmp_path_factory.mktemp("errors")
    for name in ("store", "truncated", "unreadable", "flipped", "rewritten", "shrunk"):
        write_store(folder / name, [f"x{i} = {i}\n" * 40 for i in range(50)])
    tokens = folder / "truncated" / "tokens.bin"
    os.truncate(tokens, tokens.stat().st_size // 2)
    (folder / "unreadable" / "meta.json").write_text("{")
    _change_byte(folder / "flipped")
    (folder / "one_line.py").write_text("def get_config():\n    return 1 / 0\n")
    output, errors = _start(folder, "run").communicate(timeout=PATIENCE)
    assert os.path.exists(folder / "run" / "checkpoints" / "10"), output + errors
    return folder


def _change_byte(store):
    content = bytearray((store / "tokens.bin").read_bytes())
    content[1001] ^= 4
    with open(store / "tokens.bin", "r+b") as file:  # In place.
        file.write(content)


def _start(folder, workdir, *flags, num_steps=10, **kwargs):
    words = [
        f"--workdir={workdir}",
        "--config=smoke",
        f"--config.data.stores={folder / 'store'}",
        "--config.data.context_length=16",
        f"--config.trainer.num_steps={num_steps}",
        "--config.trainer.eval_interval=1000",
        "--config.logger.sample_tokens=0",
        *flags,
    ]
    env = {
        # The runs share compiled programs.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "BUILD_WORKING_DIRECTORY": str(folder),
    }
    return start_tool(train, *words, env=env, **kwargs)


def _error(process):
    """Waits for a run that must fail; returns the one line on stderr after those of the start."""
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, errors
    *others, line = errors.splitlines()
    assert line.startswith("error: ") and errors.endswith("\n"), errors
    assert all(other.startswith("train: ") for other in others), errors
    return line


def _contents(workdir):
    return {str(path): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


_BAD_INPUT = {
    "typo": (["--config.model.embeding_dim=256"], "did you mean model.embedding_dim?"),
    "value": (["--config.model.dtype=float16"], "model.dtype='float16' is unknown"),
    "flag": (["--wrokdir=x"], "wrokdir"),
    "config": (["--config=smok"], "there is no file"),
    "config file": (["--config=one_line.py"], "one_line.py:2: ZeroDivisionError"),
    "mesh": (["--config.mesh.tp=3"], "tp=3 needs a multiple of 3 devices; found 1"),
    "batch": (
        ["--simulate_devices=3"],
        "data.batch_size=8 does not divide into 3 shards",
    ),
    "no store": (["--config.data.stores=/no/store"], "no token store at /no/store"),
    "no validation store": (
        ["--config.data.validation_stores=('wiki=/no/wiki',)"],
        "no token store at /no/wiki",
    ),
    "truncated": (["--config.data.stores=FOLDER/truncated"], "truncated or damaged: tokens.bin"),
    "flipped": (["--config.data.stores=FOLDER/flipped"], "damaged: the SHA-256 of tokens.bin"),
    "flipped validation store": (
        ["--config.data.validation_stores=('wiki=FOLDER/flipped',)"],
        "flipped is damaged: the SHA-256 of tokens.bin",
    ),
    "unreadable": (["--config.data.stores=FOLDER/unreadable"], "unreadable: meta.json"),
    "vocabulary": (["--config.model.vocab_size=100"], "only model.vocab_size=100"),
    "implementation": (
        ["--config.backend.implementation=mosaic"],
        "backend.implementation=mosaic cannot be used: it needs a Hopper GPU",
    ),
    "processes": (["--num_processes=2"], "go together"),
    "both": (["--distributed", "--process_id=0"], "give either it, or --coordinator_address"),
    "alone": (["--distributed"], "no scheduler started this process: start it with srun"),
}


def _start_with(folder, workdir, name):
    flags, _ = _BAD_INPUT[name]
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    # Otherwise another store or vocabulary would be rejected as another configuration.
    return _start(folder, workdir, "--allow_config_change", *flags)


@pytest.fixture(scope="module")
def errors_of_bad_input(folder):
    """The error of a start in the folder of a run, by the name of the bad input."""
    before, names, lines = _contents(folder / "run"), list(_BAD_INPUT), {}
    while names:  # Two at a time: most of it is importing.
        processes = {name: _start_with(folder, "run", name) for name in names[:2]}
        lines |= {name: _error(process) for name, process in processes.items()}
        names = names[2:]
    assert _contents(folder / "run") == before
    return lines


@pytest.mark.parametrize("name", _BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(errors_of_bad_input, name):
    _, named = _BAD_INPUT[name]
    assert named in errors_of_bad_input[name]


def test_bad_input_makes_no_folder(folder):
    assert "mosaic cannot be used" in _error(_start_with(folder, "never", "implementation"))
    assert not os.path.exists(folder / "never")


def test_help_lists_the_flags_and_succeeds(folder):
    output, errors = _start(folder, "new", "--help").communicate(timeout=PATIENCE)
    for flag in ("workdir", "config", "simulate_devices", "[no]allow_config_change"):
        assert f"\n  --{flag}" in output, errors
    assert "--config.mesh.tp=2" in output  # An example of a field; not all of them are listed.
    assert output.count("--config.") == 1


def test_the_flag_of_a_field_and_the_name_of_a_config_are_suggested(folder):
    line = _error(_start(folder, "new", "--num_steps=60"))
    assert line == "error: there is no flag --num_steps; did you mean --config.trainer.num_steps?"
    line = _error(_start(folder, "new", "--config=smok"))
    assert line.endswith("did you mean --config=smoke?")


def test_bad_input_leaves_no_folder(folder):
    for process in [_start_with(folder, "new", name) for name in ("mesh", "no validation store")]:
        _error(process)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--config.model.num_heads=2", "model.num_heads was 4, is 2"),
        ("--config.trainer.seed=1", "trainer.seed was 0, is 1"),
    ],
)
def test_the_folder_of_another_run_is_left_alone(folder, flag, named):
    before = _contents(folder / "run")
    line = _error(_start(folder, "run", flag))
    assert f"({named})" in line and "--allow_config_change" in line
    assert _contents(folder / "run") == before


def test_a_run_that_diverges_keeps_what_is_good(folder):
    line = _error(
        _start(
            folder,
            "diverging",
            "--config.schedule.peak_lr=1e38",
            "--config.trainer.checkpoint_interval=1",
            num_steps=50,
        )
    )
    assert "training diverged at step" in line and "update_norm=inf" in line
    text = (folder / "diverging" / "metrics.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert "NaN" not in text and "Infinity" not in text
    assert "update_norm" in rows[-2] and "update_norm" not in rows[-1]
    kept = [int(path.name) for path in (folder / "diverging" / "checkpoints").iterdir()]
    assert max(kept) == rows[-1]["step"] - 1


def test_a_full_disk_is_one_line_and_loses_nothing(folder):
    """A limit on the size of files replaces the full disk; only checkpoints exceed it."""
    shutil.copytree(folder / "run", folder / "full")
    before = _contents(folder / "full" / "checkpoints")
    rows = (folder / "full" / "metrics.jsonl").read_text()
    limit = 60_000

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = _start(folder, "full", num_steps=40, preexec_fn=limit_file_size)
    line = _error(process)
    assert "a checkpoint cannot be written" in line
    assert "File too large" in line
    after = _contents(folder / "full" / "checkpoints")
    assert {path: after.get(path) for path in before} == before
    assert (folder / "full" / "metrics.jsonl").read_text().startswith(rows)
    # Without the limit, the run resumes from the complete checkpoint.
    process = _start(folder, "full", num_steps=20)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "resuming from step 10" in output


def test_a_folder_that_cannot_be_written_in_the_middle_of_a_run(folder):
    # Checkpoints are far apart, so that the folder moves while nothing is written to it.
    process = _start(
        folder, "blocked", "--config.trainer.checkpoint_interval=50", num_steps=100_000
    )
    checkpoints = folder / "blocked" / "checkpoints"
    wait_until(CheckpointFolder(str(checkpoints)).complete_steps, process)
    checkpoints.rename(folder / "blocked" / "good")
    checkpoints.write_text("in the way")
    line = _error(process)
    assert "a checkpoint cannot be written" in line and "Not a directory" in line
    # The complete checkpoints still are.
    checkpoints.unlink()
    (folder / "blocked" / "good").rename(checkpoints)
    step = CheckpointFolder(str(checkpoints)).complete_steps()[-1]
    output, errors = _start(folder, "blocked", num_steps=60).communicate(timeout=PATIENCE)
    assert f"resuming from step {step:,}" in output, errors


@pytest.mark.parametrize(
    "name, named",
    [
        ("rewritten", "the SHA-256 of tokens.bin .* its files were changed while they were in use"),
        ("shrunk", "tokens.bin has shrunk while it was in use: .* it ends before byte"),
    ],
)
def test_a_store_that_is_changed_under_a_run(folder, name, named):
    stores = f"--config.data.stores={folder / name}"
    process = _start(folder, f"on_{name}", stores, num_steps=100_000)
    checkpoints = CheckpointFolder(str(folder / f"on_{name}" / "checkpoints"))
    wait_until(checkpoints.complete_steps, process)
    os.utime(folder / name / "tokens.bin")  # A new date alone does not stop the run.
    time.sleep(2)
    assert process.poll() is None
    if name == "rewritten":
        _change_byte(folder / name)
    else:
        os.truncate(folder / name / "tokens.bin", 100)
    assert re.search(named, _error(process))


def test_a_folder_that_cannot_be_written_at_all(folder):
    before = _contents(folder / "run")
    line = _error(_start(folder, folder / "run" / "config.json" / "inside"))
    assert "Not a directory" in line
    assert _contents(folder / "run") == before
