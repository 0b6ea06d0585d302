import os
import platform
import shutil
import subprocess
import sys
import types

import jax
import pytest

from xlstm.trainer.llm import code_version as module
from xlstm.trainer.llm.code_version import code_version, package_versions, source_digests


def _git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which the code seems to lie."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "code_version.py"))
    (tmp_path / "code_version.py").write_text("")
    return tmp_path


def test_packages_and_python_are_named():
    version = code_version()
    assert version["jax"] == jax.__version__
    assert version["python"] == platform.python_version()
    assert {"commit", "flax", "optax", "orbax-checkpoint"} <= version.keys()


def test_packages_that_are_not_there_are_named_too(monkeypatch):
    monkeypatch.setattr(module, "_OTHER_PACKAGES", ("numpy", "no-such-package"))
    versions = package_versions()
    assert versions["jax"] == jax.__version__ and versions["numpy"]
    assert versions["no-such-package"] is None


def test_every_loaded_module_of_ours_has_a_digest_of_its_source(tmp_path, monkeypatch):
    folder = tmp_path / "xlstm" / "trainer" / "llm"
    folder.mkdir(parents=True)
    (folder / "code_version.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(folder / "code_version.py"))
    for name, path in {"ours": folder / "a.py", "other": tmp_path / "b.py"}.items():
        path.write_text("x = 1\n")
        loaded = types.ModuleType(name)
        loaded.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, loaded)
    before = source_digests()
    assert list(before) == ["xlstm/trainer/llm/a.py", "xlstm/trainer/llm/code_version.py"]
    assert source_digests() == before
    (folder / "a.py").write_text("x = 2\n")
    assert source_digests() != before


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_and_whether_files_differ_from_it(checkout):
    _git(checkout, "init")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-m", "first")
    _git(checkout, "tag", "v1", "-m", "a tag is not wanted")
    commit = code_version()["commit"]
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    (checkout / "code_version.py").write_text("changed")
    assert code_version()["commit"] == f"{commit}+changes"


def test_without_a_checkout_or_git_it_is_unknown(checkout, monkeypatch):
    assert code_version()["commit"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert code_version()["commit"] == "unknown"
