"""A short soak; `bazel run //xlstm/tools:soak` runs all of it."""

import json
import pathlib
import random
import shutil

import pytest

from xlstm.tools.testing.soak import Soak
from xlstm.tools.testing.soak_injuries import injuries_for
from xlstm.tools.testing.soak_run import HurtRun, SoakConfig

_CONFIG = SoakConfig(num_steps=300, checkpoint_interval=10, steps_between_injuries=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def soak(folder):
    return Soak(str(folder), _CONFIG, random.Random(0))


def test_a_run_that_is_hurt_ends_as_one_that_is_not(soak):
    by_name = {injury.name: injury for injury in injuries_for(1)}
    names = ["SIGTERM", "checkpoint flipped", "streak of bad steps"]
    # It may be at its end before the last, and a checkpoint that is alone is not damaged.
    left = soak.hurt("hurt", [by_name[name] for name in names])
    assert len(left) <= 1
    counts = {name: kind.count for name, kind in soak.kinds.items()}
    assert counts == {name: 1 for name in names if by_name[name] not in left}


def test_the_soak_notices_what_is_wrong(soak, folder):
    shutil.copytree(folder / "undisturbed", folder / "copy")
    copy = HurtRun(str(folder), "copy", _CONFIG, random.Random(0))
    copy.compare(soak.undisturbed)
    metrics = folder / "copy" / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    for wrong in (
        rows[:-5] + rows[-4:],
        rows[:50] + rows[49:],
        rows[:-1] + [json.dumps(json.loads(rows[-1]) | {"val_loss": 5.0}) + "\n"],
    ):
        metrics.write_text("".join(wrong))
        with pytest.raises(AssertionError, match="copy"):
            copy.compare(soak.undisturbed)


def test_the_soak_notices_a_wrong_start(soak, folder):
    shutil.copytree(folder / "undisturbed", folder / "wrong")
    run = HurtRun(str(folder), "wrong", _CONFIG, random.Random(0))
    *_, before, last = run.confirmed_steps()
    log = pathlib.Path(run.log_path(0))
    run.prepare()
    log.write_text(f"resuming from step {last}")
    run.join()
    log.write_text(f"resuming from step {before}")
    with pytest.raises(AssertionError, match=f"resumed from {before}, not from {last}"):
        run.join()
    run.mark_damaged(last)
    run.prepare()
    log.write_text(f"resuming from step {before}")
    with pytest.raises(AssertionError, match=f"did not say that the checkpoint of {last} is dam"):
        run.join()


def test_every_kind_can_be_done_to_two_processes_or_one():
    names = {count: {injury.name for injury in injuries_for(count)} for count in (1, 2)}
    assert len(names[1]) >= 12 and len(names[2]) >= 12
    assert "SIGKILL" in names[1] & names[2]
    assert "other store" in names[2] - names[1]
