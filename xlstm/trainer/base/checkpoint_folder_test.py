import pytest

from xlstm.trainer.base.checkpoint_folder import CheckpointFolder, Retention, best_step


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    for step, val_loss in {9: 3.0, 10: None, 100: 2.0}.items():
        folder.make(step)
        folder.complete(step, {"code": step}, val_loss)
    return folder


def _names(path):
    return sorted(path.name for path in path.iterdir())


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(1), {8}),
        (Retention(2), {7, 8}),
        (Retention(99), {1, 2, 3, 4, 7, 8}),
        (Retention(1, keep_interval=2), {2, 4, 8}),
        (Retention(1, keep_best=True), {3, 8}),
        (Retention(2, keep_interval=4, keep_best=True), {3, 4, 7, 8}),
    ],
)
def test_what_is_kept(retention, expected):
    val_losses = {1: 5.0, 2: None, 8: None, 3: 1.5, 4: 1.5, 7: 2.0}
    assert retention.kept(val_losses) == {step: val_losses[step] for step in expected}


def test_the_best_step():
    assert best_step({1: 2.0, 3: 1.0, 2: 1.0, 4: None}) == 2
    assert best_step({1: None}) is None
    assert best_step({}) is None
    assert Retention(1, keep_best=True).kept({1: None, 2: None}) == {2: None}


def test_what_is_written_is_read(folder):
    assert folder.steps() == [9, 10, 100]
    assert folder.val_losses() == {9: 3.0, 10: None, 100: 2.0}
    assert folder.run_info(10) == {"code": 10}


def test_a_folder_that_is_not_there(tmp_path):
    folder = CheckpointFolder(str(tmp_path / "none"))
    assert folder.steps() == []
    assert folder.val_losses() == {}
    folder.remove_leftovers()
    assert not (tmp_path / "none").exists()


def test_only_whole_checkpoints_count(folder):
    folder.make(200)
    assert folder.steps() == [9, 10, 100, 200]
    assert [step for step in folder.steps() if folder.is_whole(step)] == [9, 10, 100]
    assert 200 not in folder.val_losses()
    folder.make(100)  # Beginning again, it is not whole any more.
    assert not folder.is_whole(100)


def test_a_damaged_loss_is_no_loss(folder, tmp_path):
    (tmp_path / "checkpoints" / "9" / "run_info.json").write_text("{")
    (tmp_path / "checkpoints" / "100" / "run_info.json").unlink()
    assert folder.val_losses() == {9: None, 10: None, 100: None}


def test_removing(folder, tmp_path):
    folder.remove([9, 11])
    assert folder.steps() == [10, 100]
    for name in ("9.removed", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name / "deep").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").write_text("somebody's")
    folder.remove_leftovers()
    assert _names(tmp_path / "checkpoints") == ["10", "100", "notes.txt"]


def test_setting_aside(folder, tmp_path):
    aside = tmp_path / "damaged_checkpoints"
    for expected in ("9", "9-2", "9-3"):
        assert folder.set_aside(9) == str(aside / expected)
        folder.make(9)
    assert _names(aside) == ["9", "9-2", "9-3"]
    assert (aside / "9" / "run_info.json").exists()
