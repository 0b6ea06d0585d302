import os
import platform
import shutil
import subprocess

import jax
import pytest

from xlstm.trainer.llm import code_version as module
from xlstm.trainer.llm.code_version import code_version


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
