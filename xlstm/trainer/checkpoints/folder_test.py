import errno
import json
import os

import pytest

from xlstm.trainer.checkpoints.folder import (
    CheckpointFolder,
    CheckpointMetadata,
    Retention,
    best_step,
    confirmed_step,
    parse_step,
)

_Metadata = CheckpointMetadata


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    for step, val_loss in {9: 3.0, 10: None, 100: 2.0}.items():
        folder.begin(step)
        folder.finalize(step, {"code": step}, _Metadata(val_loss, permanent=step == 9))
    return folder


def _names(path):
    return sorted(path.name for path in path.iterdir())


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(1), {2, 8}),
        (Retention(2), {2, 7, 8}),
        (Retention(99), {1, 2, 3, 4, 7, 8}),
        (Retention(1, keep_best=True), {2, 3, 8}),
    ],
)
def test_what_is_kept(retention, expected):
    losses = {1: 5.0, 2: None, 8: None, 3: 1.5, 4: 1.5, 7: 2.0}
    saved = {step: _Metadata(loss, permanent=step == 2) for step, loss in losses.items()}
    assert retention.kept(saved) == {step: saved[step] for step in expected}


@pytest.mark.parametrize(
    "confirmed, expected",
    [
        ("11111", {4, 5}),
        ("11110", {3, 4, 5}),  # The latest one is kept for inspection.
        ("11000", {1, 2, 5}),
        ("10000", {1, 5}),
        ("00000", {5}),
        ("01010", {2, 4, 5}),
        ("10101", {3, 5}),
    ],
)
def test_a_streak_of_unconfirmed_ones_removes_no_confirmed_one(confirmed, expected):
    saved = {step: _Metadata(confirmed=x == "1") for step, x in enumerate(confirmed, start=1)}
    assert Retention(2).kept(saved).keys() == expected
    newest = confirmed.rfind("1") + 1
    assert confirmed_step(saved) == (newest or None)
    assert not newest or newest in Retention(1).kept(saved)


def test_what_is_kept_for_ever():
    retention = Retention(1, keep_period=3)
    assert [step for step in range(1, 9) if retention.is_permanent(step)] == [3, 6]
    assert not Retention(1).is_permanent(3)


def test_the_best_step():
    assert best_step({1: _Metadata(2.0), 3: _Metadata(1.0), 2: _Metadata(1.0), 4: _Metadata()}) == 2
    assert best_step({1: _Metadata()}) is None
    assert best_step({}) is None
    assert best_step({1: _Metadata(2.0), 2: _Metadata(1.0, confirmed=False)}) == 1
    unsure = {1: _Metadata(1.5), 2: _Metadata(2.0), 3: _Metadata(1.0, confirmed=False)}
    assert list(Retention(1, keep_best=True).kept(unsure)) == [1, 2, 3]
    unknown = {1: _Metadata(), 2: _Metadata()}
    assert Retention(1, keep_best=True).kept(unknown) == {2: _Metadata()}


def test_what_is_written_is_read(folder):
    assert folder.steps() == [9, 10, 100]
    assert folder.metadata() == {
        9: _Metadata(3.0, permanent=True),
        10: _Metadata(None),
        100: _Metadata(2.0),
    }
    assert folder.run_info(10) == {"code": 10}


def test_a_folder_that_is_not_there(tmp_path):
    folder = CheckpointFolder(str(tmp_path / "none"))
    assert folder.steps() == []
    assert folder.metadata() == {}
    assert folder.remove_leftovers() == []
    assert not (tmp_path / "none").exists()


def test_what_is_being_written_does_not_count(folder):
    folder.begin(200)
    folder.begin(300)
    assert folder.steps() == folder.complete_steps() == [9, 10, 100]
    folder.begin(300)  # Started again after a failure.
    folder.finalize(300, {}, _Metadata(1.0))
    assert folder.metadata()[300] == _Metadata(1.0)
    assert folder.remove_leftovers() == [200]
    assert folder.steps() == [9, 10, 100, 300]


def test_no_checkpoint_is_written_over(folder):
    folder.begin(100)
    with pytest.raises(OSError):
        folder.finalize(100, {}, _Metadata(1.0))
    assert folder.metadata()[100] == _Metadata(2.0)


def test_without_checksums_nothing_is_known(folder, tmp_path):
    (tmp_path / "checkpoints" / "10" / "checksums.json").unlink()
    assert folder.steps() == [9, 10, 100]
    assert folder.complete_steps() == list(folder.metadata()) == [9, 100]


def test_of_a_damaged_one_nothing_is_known(folder, tmp_path):
    (tmp_path / "checkpoints" / "9" / "run_info.json").write_text("{")
    (tmp_path / "checkpoints" / "100" / "run_info.json").unlink()
    assert folder.metadata() == dict.fromkeys((9, 10, 100), _Metadata())


def test_removing(folder, tmp_path):
    folder.remove([9, 11])
    assert folder.steps() == [10, 100]
    for name in ("9.removed", "11.unfinished"):
        (tmp_path / "checkpoints" / name / "deep").mkdir(parents=True)
    foreign = ["10.backup", "2024.txt", "notes.txt"]
    for name in foreign:
        (tmp_path / "checkpoints" / name).write_text("somebody's")
    assert folder.remove_leftovers() == [11]
    assert _names(tmp_path / "checkpoints") == sorted(["10", "100", *foreign])


def test_setting_aside(folder, tmp_path):
    aside = tmp_path / "damaged_checkpoints"
    for expected in ("9", "9-2", "9-3"):
        assert folder.set_aside(9, "damaged_checkpoints") == str(aside / expected)
        folder.begin(9)
        folder.finalize(9, {}, _Metadata())
    assert _names(aside) == ["9", "9-2", "9-3"]
    assert (aside / "9" / "run_info.json").exists()


def test_setting_aside_on_another_disk(folder, monkeypatch):
    """As if the folder of the checkpoints were a link to another disk."""

    def rename(*paths):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        path = folder.set_aside(9, "damaged_checkpoints")
    assert {"run_info.json", "checksums.json"} <= set(os.listdir(path))
    assert folder.steps() == [10, 100]


def test_what_was_set_aside_before_can_be_forgotten(folder, tmp_path):
    folder.clear_set_aside("unconfirmed_checkpoints")  # There is nothing yet.
    for step in (9, 10):
        folder.set_aside(step, "unconfirmed_checkpoints")
    folder.clear_set_aside("unconfirmed_checkpoints")
    assert not (tmp_path / "unconfirmed_checkpoints").exists()
    assert folder.steps() == [100]


def test_versions_before_did_not_judge(folder, tmp_path):
    path = tmp_path / "checkpoints" / "9" / "run_info.json"
    info = json.loads(path.read_text())
    assert list(info) == ["val_loss", "for_ever", "confirmed", "soundness", "run"]
    assert (info.pop("confirmed"), info.pop("soundness")) == (True, None)
    path.write_text(json.dumps(info))
    assert folder.metadata()[9] == _Metadata(3.0, permanent=True, confirmed=True, soundness=None)


@pytest.mark.parametrize(
    "name", ["٣", "³", "1e3", "007", "+7", "-7", " 7", "7\n", "\x1b[2J", "7_0", "9" * 5000, "", "x"]
)
def test_other_names_are_no_steps(tmp_path, name):
    assert parse_step(name) is None
    if len(name) < 200:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / f"{name}.unfinished").mkdir()
    (tmp_path / "12").write_text("a file")
    folder = CheckpointFolder(str(tmp_path))
    assert folder.steps() == [12] and folder.complete_steps() == [] and folder.metadata() == {}
    assert folder.remove_leftovers() == []


def test_what_is_no_information_of_a_run(folder):
    path = os.path.join(folder.step_dir(9), "run_info.json")
    for content in ("[]", "{}", '{"run": 3}', '{"run":' + "[" * 100_000, "\ufeff{}"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
        with pytest.raises(ValueError, match="run_info.json"):
            folder.run_info(9)
        assert folder.metadata()[9] == _Metadata()
