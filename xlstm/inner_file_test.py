import os

import pytest

from xlstm.inner_file import check_inside, find_file, find_outward_link, inner_path


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and another folder, beside a file of somebody else."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "file").write_text("file")
    return folder


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/hosts", "../secret", "more/x", "a\0b", "\ud800"]
)
def test_a_name_is_a_plain_one(folder, name):
    with pytest.raises(ValueError, match="no plain name of a file in that folder") as caught:
        inner_path(str(folder), name)
    assert repr(name) in str(caught.value)


def test_what_is_there_is_found(folder):
    assert find_file(str(folder), "file") == str(folder / "file")
    assert find_file(str(folder), "more") == str(folder / "more")
    assert find_file(str(folder), "none") is None
    assert find_file(str(folder), "..file") is None
    assert find_file(str(folder / "none"), "file") is None


def test_links_stay_inside(folder):
    (folder / "same").symlink_to("file")
    (folder / "more" / "up").symlink_to("../file")
    (folder / "twice").symlink_to(folder / "same")
    for name in ("same", "twice"):
        assert find_file(str(folder), name) == str(folder / name)
    check_inside(str(folder), str(folder / "more" / "up"))
    assert find_outward_link(str(folder)) is None
    # The folder itself may be elsewhere.
    (folder.parent / "link").symlink_to("model")
    assert find_file(str(folder.parent / "link"), "same") is not None
    # But a folder in it is one of its own.
    with pytest.raises(ValueError, match="leads out of"):
        find_file(str(folder / "more"), "up")


@pytest.mark.parametrize("target", ["../secret", "..", "more/../../secret", "/", "../model2"])
def test_links_that_leave_are_refused(folder, target):
    (folder.parent / "model2").mkdir()
    (folder / "more" / "out").symlink_to(os.path.join("..", target))
    (folder / "out").symlink_to(target)
    (folder / "by way of").symlink_to("out")
    for name in ("out", "by way of"):
        with pytest.raises(ValueError, match=f"model/{name} is a link that leads out of"):
            find_file(str(folder), name)
    (folder / "out").unlink()
    (folder / "by way of").unlink()
    assert "more/out is a link that leads out of" in find_outward_link(str(folder))


def test_what_is_no_file(folder):
    (folder / "nowhere").symlink_to("nothing")
    with pytest.raises(ValueError, match="nowhere is a link to nothing$"):
        find_file(str(folder), "nowhere")
    (folder / "loop").symlink_to("loop")
    with pytest.raises((ValueError, OSError), match="loop"):
        find_file(str(folder), "loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is no file$"):
        find_file(str(folder), "pipe")


def test_the_cache_of_the_hub(folder):
    cache = folder.parent / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (snapshot / "more").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "fe").write_text("content")
    (snapshot / "file").symlink_to("../../blobs/fe")
    (snapshot / "more" / "file").symlink_to("../../../blobs/fe")
    assert find_file(str(snapshot), "file") == str(snapshot / "file")
    check_inside(str(snapshot), str(snapshot / "more" / "file"))
    assert find_outward_link(str(snapshot)) is None
    # What is no blob of this very model is refused.
    (cache / "refs").write_text("main")
    (snapshot / "refs").symlink_to("../../refs")
    (cache / "blobs" / "out").symlink_to(folder.parent / "secret")
    (snapshot / "out").symlink_to("../../blobs/out")
    other = folder.parent / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "fe").write_text("other")
    (snapshot / "other").symlink_to(other / "fe")
    (cache / "snapshots" / "1" / "more").mkdir(parents=True)
    (snapshot / "one").symlink_to("../1/more")
    for name in ("refs", "out", "other", "one"):
        with pytest.raises(ValueError, match="leads out of"):
            find_file(str(snapshot), name)
