import errno
import os

import pytest

from xlstm.files import naming_file, new_folder, write_atomically
from xlstm.testing.full_disk import full_disk


@pytest.mark.parametrize("content", ["Grüße\n", b"\x00\xff\r\n", ""])
def test_content_is_written(tmp_path, content):
    path = tmp_path / "file"
    write_atomically(str(path), content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"]


def test_old_content_is_replaced(tmp_path):
    path = tmp_path / "file"
    path.write_text("a long old content")
    write_atomically(str(path), "new")
    assert path.read_text() == "new"


def test_a_full_disk_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError) as caught, full_disk(1000):
        write_atomically(str(path), "x" * 100_000)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_at_the_last_moment_leaves_the_old_content(tmp_path, monkeypatch):
    def replace(*_):
        assert (tmp_path / "file.tmp").read_text() == "new"  # All of it is there before.
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(str(path), "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(str(tmp_path / "missing" / "file"), "new")


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "parents" / "folder"
    with new_folder(str(path)) as folder:
        with open(os.path.join(folder, "file"), "w") as file:
            file.write("content")
        assert not path.exists()
        # Nobody else writes there meanwhile.
        with pytest.raises(ValueError, match="folder.unfinished is being written"):
            with new_folder(str(path)):
                pass
    assert (path / "file").read_text() == "content"
    assert os.listdir(path.parent) == ["folder"]


def test_a_folder_that_was_not_finished_is_removed(tmp_path):
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            with new_folder(str(tmp_path / "folder")) as folder:
                open(os.path.join(folder, "file"), "w").close()
                raise error
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_nothing_is_overwritten_by_a_folder(tmp_path, kind):
    path = tmp_path / "taken"
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ValueError, match="taken exists already: choose another folder"):
        with new_folder(str(path)):
            pass
    assert os.listdir(tmp_path) == ["taken"]


def test_errors_name_the_file():
    full = "/dev/full"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        with naming_file(full), open(full, "w") as file:
            file.write("x")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match="'none'"), naming_file(full):
        open("none")
    with pytest.raises(OSError, match="^in other words$"), naming_file(full):
        raise OSError("in other words")
