"""Tests of file operations."""

import errno
import hashlib
import os

import pytest

from xlstm import files
from xlstm.files import (
    FolderExistsError,
    check_inside,
    file_checksum,
    find_file,
    find_outward_link,
    inner_path,
    naming_file,
    new_folder,
    parse_json,
    read_json,
    write_atomically,
)
from xlstm.testing.full_disk import full_disk


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a file and a folder; a file outside of it is next to it."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "file").write_text("file")
    return folder


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/hosts", "../secret", "more/x", "a\0b", "\ud800"]
)
def test_a_name_is_a_plain_one(folder, name):
    with pytest.raises(ValueError, match="is not a plain name of a file in that folder") as caught:
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
    # The folder itself may be a link.
    (folder.parent / "link").symlink_to("model")
    assert find_file(str(folder.parent / "link"), "same") is not None
    # But a folder in it has its own limits.
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


def test_what_is_no_file_inside(folder):
    (folder / "nowhere").symlink_to("nothing")
    with pytest.raises(ValueError, match="nowhere is a broken link$"):
        find_file(str(folder), "nowhere")
    (folder / "loop").symlink_to("loop")
    with pytest.raises((ValueError, OSError), match="loop"):
        find_file(str(folder), "loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file$"):
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
    # Only blobs of the same model are allowed.
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


def test_an_object(tmp_path):
    (tmp_path / "a.json").write_bytes('{"é": [1, {"a": null}], "a": 1e400}'.encode())
    assert read_json(str(tmp_path / "a.json")) == {"é": [1, {"a": None}], "a": float("inf")}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read: Expecting value"),
        (b'{"a": 1', "cannot be read: Expecting ',' delimiter"),
        (b"[1]", "holds no JSON object"),
        (b'"text"', "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'{"a": "\xff"}', "cannot be read: it is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read: it is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "cannot be read: Unexpected UTF-8 BOM"),
        (b'{"a": 1, "b": 2, "a": 1}', "cannot be read: the field 'a' occurs twice"),
        (b'{"b": [{"a": 1, "a": 2}]}', "cannot be read: the field 'a' occurs twice"),
        (b'{"a": ' + b"[" * 200_000, "cannot be read: it is nested too deeply"),
        (b'{"a":' * 200_000, "cannot be read: it is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read: Exceeds the limit"),
    ],
    ids=lambda x: x[:20] if isinstance(x, bytes) else "",
)
def test_what_is_none_is_one_sentence(tmp_path, content, message):
    path = str(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    text = str(caught.value)
    assert text.startswith(f"{path} {message}") and "\n" not in text
    with pytest.raises(ValueError, match=f"^there {message}"):
        parse_json(content, "there")


def test_what_is_no_json_file(tmp_path, monkeypatch):
    path = str(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json is missing$"):
        read_json(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is not a regular file$"):
        read_json(str(tmp_path))
    os.mkfifo(path)  # Nobody writes to it.
    with pytest.raises(ValueError, match="a.json is not a regular file$"):
        read_json(path)
    monkeypatch.setattr(files, "MAX_BYTES", 5)
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="b.json has 8 bytes: expected .* at most 5$"):
        read_json(str(tmp_path / "b.json"))


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
        assert (tmp_path / "file.tmp").read_text() == "new"  # It is complete before.
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
        # A second writer fails.
        with pytest.raises(ValueError, match="folder.unfinished exists: wait for"):
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


def test_of_several_writers_the_first_to_finish_wins(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(FolderExistsError, match="folder was created by another process$"):
        with new_folder(str(path), one_writer=False) as slow:
            with new_folder(str(path), one_writer=False) as quick:
                open(os.path.join(quick, "file"), "w").close()
            assert os.path.basename(slow).startswith("folder.incomplete-")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["file"]


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


@pytest.mark.parametrize("size", [0, 1, 2_500_000])
def test_checksums(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    checksum = file_checksum(str(tmp_path / "file"), sync=True)
    assert checksum.sha256 == hashlib.sha256(content).hexdigest()
    assert checksum.entry == {"bytes": size, "sha256": checksum.sha256}


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
