import bisect
import os

import numpy as np
import pytest

from xlstm.dataset.file_array import FileArray

VALUES = np.arange(10, 1010, dtype="<u2")


@pytest.fixture
def path(tmp_path):
    VALUES.tofile(tmp_path / "file")
    return str(tmp_path / "file")


def test_it_is_the_array(path):
    file = FileArray(path, "<u2")
    assert (len(file), file.num_bytes, file.dtype) == (1000, 2000, np.uint16)
    for key in (slice(None), slice(3, 7), slice(-5, None), slice(7, 3), slice(990, 2000)):
        np.testing.assert_array_equal(file[key], VALUES[key])
        assert file[key].dtype == np.uint16
    assert (file[0], file[-1], file[np.int64(5)]) == (10, 1009, 15)
    assert bisect.bisect_left(file, 500) == 490
    with pytest.raises(IndexError):
        file[1000]
    with pytest.raises(ValueError, match="has step 2"):
        file[::2]


def test_an_empty_file_and_half_an_element(tmp_path):
    for size in (0, 1):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert len(FileArray(str(tmp_path / "file"), "<u2")[:]) == 0


def test_a_file_that_shrinks(path):
    file = FileArray(path, "<u2")
    os.truncate(path, 101)
    np.testing.assert_array_equal(file[:50], VALUES[:50])
    with pytest.raises(ValueError, match="has shrunk .*expected 2,000 bytes, .*before byte 120"):
        file[40:60]


def test_a_file_that_cannot_be_read_is_named(path, monkeypatch):
    file = FileArray(path, "<u2")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error.*file"):
        file[:]


def test_another_file_that_takes_its_place_plays_no_part(path):
    file = FileArray(path, "<u2")
    np.zeros(5, "<u2").tofile(f"{path}.new")
    os.replace(f"{path}.new", path)
    np.testing.assert_array_equal(file[:], VALUES)


def test_facts_differ_after_every_change(path):
    file = FileArray(path, "<u2")
    signatures = [file.stat_signature]
    assert file.stat_signature == signatures[0]
    with open(path, "r+b") as other:
        other.write(b"x")
    # Even if the modification time is reset.
    os.utime(path, ns=(signatures[0][1], signatures[0][1]))
    signatures.append(file.stat_signature)
    os.truncate(path, 100)
    signatures.append(file.stat_signature)
    assert len(set(signatures)) == 3


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="it is not a regular file"):
            FileArray(str(other), "<u2")
    with pytest.raises(FileNotFoundError):
        FileArray(str(tmp_path / "nowhere"), "<u2")


def test_a_file_is_closed_when_it_is_no_longer_used(path):
    count = len(os.listdir("/dev/fd"))
    files = [FileArray(path, "<u2") for _ in range(5)]
    assert len(os.listdir("/dev/fd")) == count + 5
    del files
    assert len(os.listdir("/dev/fd")) == count
