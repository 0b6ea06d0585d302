"""Tests of what a checkout and an installed wheel know about themselves."""

import os
import shutil
import subprocess

import pytest

from xlstm import installation

_needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def _git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that seems to hold the code."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "installation.py"))
    (tmp_path / "installation.py").write_text("")
    return tmp_path


@_needs_git
def test_the_commit_and_whether_files_differ_from_it(folder):
    _git(folder, "init")
    _git(folder, "add", ".")
    _git(folder, "commit", "-m", "first")
    _git(folder, "tag", "v1", "-m", "a tag is not wanted")
    commit = installation.commit()
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    (folder / "installation.py").write_text("changed")
    assert installation.commit() == f"{commit}+changes"


@_needs_git
def test_the_commit_of_another_project_around_it_is_not_ours(folder):
    (folder / "other.py").write_text("")
    _git(folder, "init")
    _git(folder, "add", "other.py")
    _git(folder, "commit", "-m", "first")
    assert installation.commit() == "unknown"


def test_without_a_checkout_or_git_it_is_unknown(folder, monkeypatch):
    assert installation.commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert installation.commit() == "unknown"


def test_a_wheel_names_its_commit_and_its_command(folder):
    assert not installation.is_installed()
    assert installation.tool_command("train") == "./bazelw run //xlstm/tools:train --"
    (folder / "COMMIT").write_text("0123+changes\n")
    assert installation.is_installed()
    assert installation.commit() == "0123+changes"
    assert installation.tool_command("train") == "xlstm-lm train"
