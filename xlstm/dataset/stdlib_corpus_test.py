import multiprocessing
import os

import pytest

from xlstm.dataset.stdlib_corpus import build_stdlib_store, open_stdlib_store, stdlib_files
from xlstm.dataset.testing import open_verified
from xlstm.files import FolderExistsError


def test_files():
    files = stdlib_files()
    assert files == sorted(set(files))
    names = {os.path.basename(path) for path in files}
    assert {"argparse.py", "json"} & names == {"argparse.py"}
    for path in files:
        assert path.endswith(".py")
        folders = set(path.split(os.sep))
        assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def test_store_is_the_text(tmp_path):
    store = build_stdlib_store(str(tmp_path / "stdlib"))
    assert store.meta.num_tokens > 3_000_000
    position = [path.endswith("/argparse.py") for path in stdlib_files()].index(True)
    with open(stdlib_files()[position], "rb") as file:
        assert b"\0" + file.read() in bytes(store.tokens[:])
    with pytest.raises(FolderExistsError):
        build_stdlib_store(store.path)


def test_an_existing_store_is_opened(tmp_path):
    path = str(tmp_path / "stdlib")
    open_stdlib_store(path)
    before = os.stat(os.path.join(path, "meta.json"))
    open_stdlib_store(path)
    assert os.stat(os.path.join(path, "meta.json")).st_mtime_ns == before.st_mtime_ns
    os.remove(os.path.join(path, "tokens.bin"))
    with pytest.raises(ValueError, match="cannot read .*tokens.bin"):
        open_stdlib_store(path)


def _open_and_count(path):
    return open_stdlib_store(path).meta.num_tokens


def test_processes_may_race(tmp_path):
    path = str(tmp_path / "stdlib")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        counts = pool.map(_open_and_count, [path] * 3, chunksize=1)
    assert len(set(counts)) == 1
    assert os.listdir(tmp_path) == ["stdlib"]
    open_verified(path)
