import json
import os
import shutil

import pytest

from xlstm.dataset.store_sample import sample_store
from xlstm.dataset.testing import write_store
from xlstm.dataset.token_store import TokenStore


@pytest.fixture
def paths(tmp_path):
    """Returns two equal stores."""
    write_store(tmp_path / "one", ["some text\n" * 500_000, "more\n"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two"


def _different(one, two):
    ours, theirs = sample_store(one), sample_store(two)
    assert ours.keys() == theirs.keys() == {"tokens.bin", "documents.bin"}
    return {name for name in ours if ours[name] != theirs[name]}


def _open(paths):
    return [TokenStore.open(str(path)) for path in paths]


def test_copies_are_the_same(paths):
    assert _different(*_open(paths)) == set()


@pytest.mark.parametrize("where", ["first", "last", "near the middle"])
def test_other_bytes_are_seen(paths, where):
    path = paths[1] / "tokens.bin"
    size = os.path.getsize(path)
    # The tenth of 18 blocks starts shortly after the middle.
    offset = {"first": 0, "last": size - 1, "near the middle": (size - 65536) * 9 // 17 + 5}[where]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"#")
    assert _different(*_open(paths)) == {"tokens.bin"}


def test_another_size_and_another_record_are_seen(paths):
    meta = json.loads((paths[1] / "meta.json").read_text())
    meta["files"]["tokens.bin"]["sha256"] = "0" * 64
    (paths[1] / "meta.json").write_text(json.dumps(meta))
    stores = _open(paths)
    with open(paths[1] / "documents.bin", "ab") as file:
        file.write(b"x")
    assert _different(*stores) == {"documents.bin", "tokens.bin"}
