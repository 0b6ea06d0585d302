"""Tests of runs, started as a user starts them."""

import json
import random

import matplotlib.image
import pytest

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE
from xlstm.tools import train
from xlstm.tools.testing.start_tool import start_tool
from xlstm.trainer.callbacks.metrics import SPEEDS

_NUM_STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the runs and their data."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def start(folder):
    """A function that starts a run in a folder of the given name, and returns its process."""
    rng = random.Random(0)
    words = ["def", "return", "self", "x", "=", "(", ")\n"]
    write_store(folder / "store", [" ".join(rng.choices(words, k=200)) for _ in range(50)])
    # Most of a run's time is compilation, so the runs share compiled programs.
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "BUILD_WORKING_DIRECTORY": str(folder),
    }

    def start(workdir, *flags, num_steps=_NUM_STEPS):
        words = [
            f"--workdir={workdir}",
            "--config=smoke",
            f"--config.data.stores={folder / 'store'}",
            "--config.data.context_length=16",
            f"--config.trainer.num_steps={num_steps}",
            "--config.trainer.eval_interval=50",
            "--config.logger.sample_tokens=8",
            *flags,
        ]
        return start_tool(train, *words, env=env)

    return start


def _finish(process):
    """Waits for a run that must succeed; returns what it printed."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def _rows(workdir):
    with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _repeatable(rows):
    """Returns the rows without the fields that depend on the speed of the machine."""
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


def _contents(workdir):
    """Returns the content of every file except event files, of which each start writes one."""
    paths = [path for path in workdir.rglob("*") if path.is_file()]
    return {
        str(path): path.read_bytes() for path in paths if path.parent != workdir / "tensorboard"
    }


@pytest.fixture(scope="module")
def straight(folder, start):
    """The folder and the output of an uninterrupted run."""
    output = _finish(start("straight"))
    return folder / "straight", output


@pytest.fixture(scope="module")
def repeated(folder, start, straight):
    """Folders of a run with the same seed and of one with another seed."""
    processes = [start("same"), start("other", "--config.trainer.seed=1")]
    for process in processes:
        _finish(process)
    return folder / "same", folder / "other"


def test_a_run_leaves_everything_in_its_folder(straight):
    workdir, output = straight
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
    ]
    with open(workdir / "config.json", encoding="utf-8") as file:
        config = json.load(file)["config"]
    assert config["data"]["context_length"] == 16
    assert config["trainer"]["num_steps"] == _NUM_STEPS
    steps = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert sorted(steps) == ["100", "90"]
    assert matplotlib.image.imread(workdir / "loss.png").ndim == 3
    (events,) = (workdir / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(tag in data for tag in (b"loss", b"val_loss", b"grad_norm", b"tokens_per_second"))


def test_a_run_tells_what_it_does(straight):
    workdir, output = straight
    assert "mesh: dp=1, fsdp=1, pp=1, cp=1, tp=1 (1 CPU device)\n" in output
    assert output.count("mLSTM: XLA program, chunks of ") == 1
    assert "42,224" in output  # The number of parameters, under the table.
    assert "lm_head.kernel" in output
    assert output.count("validation: loss") == 3
    assert "a sample" in output
    assert str(workdir) in output.splitlines()[-1]


def test_metrics_are_rows_of_every_step(straight):
    rows = _rows(straight[0])
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, _NUM_STEPS + 1))
    for row in training:
        assert row.keys() == {
            "step",
            "loss",
            "grad_norm",
            "param_norm",
            "update_norm",
            "lr",
            "skipped_steps",
            "tokens",
            "tokens_per_second",
            "tokens_per_second_per_device",
            "matmul_fraction",
            "goodput",
            "peak_memory",
        }
        assert row["tokens"] == row["step"] * 8 * 16
        assert row["tokens_per_second"] > 0
    validation = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validation] == [0, 50, 100]
    for row in validation:
        assert row.keys() == {
            "step",
            "val_loss",
            "val_perplexity",
            "val_accuracy",
            "val_bits_per_byte",
        }


def test_the_loss_falls(straight):
    losses = [row["val_loss"] for row in _rows(straight[0]) if "val_loss" in row]
    assert losses[0] > 5.0  # More than the 5.55 nats of even odds, or nearly.
    assert losses[-1] < losses[0] - 1.0


def test_the_same_seed_gives_the_same_run(straight, repeated):
    same, _ = repeated
    assert _repeatable(_rows(same)) == _repeatable(_rows(straight[0]))


def test_another_seed_gives_another_run(straight, repeated):
    _, other = repeated
    ours, theirs = _rows(straight[0]), _rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert all(
        one[name] != two[name]
        for one, two in zip(ours, theirs, strict=True)
        for name in ("loss", "val_loss")
        if name in one
    )


def test_a_finished_run_is_left_as_it_is(straight, start):
    workdir, _ = straight
    before = _contents(workdir)
    output = _finish(start("straight"))
    assert "resuming from step 100" in output
    after = _contents(workdir)
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == []
