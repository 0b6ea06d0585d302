import errno
import os
import resource

import pytest

from xlstm.trainer.base.files import write_atomically


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
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_atomically(str(path), "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
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
