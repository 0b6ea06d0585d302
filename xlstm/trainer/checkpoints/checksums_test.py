import errno
import json
import os

import pytest

from xlstm.trainer.checkpoints import checksums
from xlstm.trainer.checkpoints.checksums import (
    CHECKSUMS,
    find_damage,
    has_checksums,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path):
    """Small files, an empty one and one of several blocks, at several depths."""
    files = {"a": b"12345", "b/c/empty": b"", "b/big": os.urandom(2_500_000), "b/ü": b"\0"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_checksums(str(tmp_path))
    return tmp_path


def _flip(path, position, bits=1):
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def test_whole_files_are_whole(folder):
    assert find_damage(str(folder)) is None
    (folder / "later").write_text("does not matter")
    assert find_damage(str(folder)) is None


def test_checksums_are_there_once_they_are_written(tmp_path):
    (tmp_path / "a").write_text("a")
    assert not has_checksums(str(tmp_path))
    assert find_damage(str(tmp_path)) == "checksums.json is missing"
    write_checksums(str(tmp_path))
    assert has_checksums(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a", CHECKSUMS]


@pytest.mark.parametrize("position", [0, 1_048_576, 2_499_999])
def test_a_flipped_bit_is_found(folder, position):
    _flip(folder / "b" / "big", position)
    assert find_damage(str(folder)) == "b/big has other bytes than were written"


def test_every_flipped_bit_of_the_checksums_is_found(folder):
    path = folder / CHECKSUMS
    for position in range(0, path.stat().st_size, 7):
        bits = 1 << position % 8
        _flip(path, position, bits)
        assert find_damage(str(folder)) == "checksums.json has other bytes than were written"
        _flip(path, position, bits)
    assert find_damage(str(folder)) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": 1}', "\xff"])
def test_other_content_of_the_checksums_is_found(folder, content):
    (folder / CHECKSUMS).write_bytes(content.encode("latin-1"))
    assert find_damage(str(folder)) == "checksums.json has other bytes than were written"


def test_another_size_is_found_and_told(folder):
    os.truncate(folder / "b" / "big", 1_000_000)
    expected = "b/big has 1,000,000 bytes, not the 2,500,000 that were written"
    assert find_damage(str(folder)) == expected
    (folder / "b" / "c" / "empty").write_text("x")
    os.remove(folder / "b" / "big")
    assert find_damage(str(folder)) == "b/big is missing"
    (folder / "b" / "big").mkdir()
    assert find_damage(str(folder)).startswith("b/big ")


def test_what_cannot_be_read_is_damaged(folder, monkeypatch):
    def fail(path, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(checksums, "file_checksum", fail)
    assert find_damage(str(folder)) == "a cannot be read (Input/output error)"
    with pytest.raises(OSError, match="Input/output error"):
        write_checksums(str(folder))


@pytest.mark.parametrize("name", ["../outside", "/etc/hosts", "b/../../outside", "", ".", "a\0"])
def test_names_of_files_elsewhere_are_missing(folder, name):
    (folder.parent / "outside").write_bytes(b"12345")
    entry = json.loads((folder / CHECKSUMS).read_text())["files"]["a"]
    (folder / CHECKSUMS).write_bytes(checksums._encode({name: entry}))
    assert find_damage(str(folder)) == f"{name} is missing"


def test_links_that_leave_are_damage(folder):
    (folder.parent / "outside").write_bytes(b"12345")
    (folder / "a").unlink()
    (folder / "a").symlink_to("../outside")
    assert "a is a link that leads out of" in find_damage(str(folder))
    (folder / "a").unlink()
    (folder / "copy").write_bytes(b"12345")
    (folder / "a").symlink_to("copy")
    assert find_damage(str(folder)) is None


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": "5"}, {"bytes": True, "sha256": "x"}])
def test_entries_of_other_kinds_are_found(folder, entry):
    (folder / CHECKSUMS).write_bytes(checksums._encode({"a": entry}))
    assert find_damage(str(folder)) == "checksums.json has other bytes than were written"
