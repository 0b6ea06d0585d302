"""Tests of the wheel as it is unpacked, apart from the checkout."""

import ast
import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from xlstm.testing.patience import PATIENCE

_INFO = r"xlstm_lm-[0-9.]+\.dist-info"
# Modules whose names differ from their distributions', and those that only a flag imports.
_DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}
_BROUGHT_BY_USERS = {"mlstm_kernels", "torch"}


@pytest.fixture(scope="module")
def wheel():
    (path,) = Path("wheel/dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _metadata(installed):
    (path,) = installed.glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text())


def _run(*words, path):
    """Runs Python with the folders `path` and the locked packages, but without the checkout."""
    packages = [x for x in sys.path if x and not os.path.isdir(os.path.join(x, "xlstm"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *packages])}
    return subprocess.run(
        [sys.executable, "-P", *words],
        env=env,
        cwd=path[0],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_the_wheel_holds_our_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = re.compile(rf"(xlstm/.*\.py|xlstm/COMMIT|xlstm_lm(_cli)?\.py|{_INFO}/.*)")
    assert [name for name in names if not ours.fullmatch(name)] == []
    assert [name for name in names if re.search("_test.py|testing|__init__", name)] == []
    assert {"xlstm/tools/configs/smoke.py", "xlstm/models/shared/norm.py"} <= set(names)


def test_every_import_is_a_requirement(installed):
    needs = [Requirement(text) for text in _metadata(installed).get_all("Requires-Dist")]
    names = {canonicalize_name(need.name) for need in needs}
    imports = set()
    for file in installed.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imports |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imports.add(node.module.partition(".")[0])
    foreign = imports - sys.stdlib_module_names - {"xlstm", "xlstm_lm"} - _BROUGHT_BY_USERS
    assert {canonicalize_name(_DISTRIBUTIONS.get(name, name)) for name in foreign} <= names


def test_the_locked_versions_meet_the_requirements(installed):
    lock = Path("third_party/requirements.txt").read_text()
    pins = re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?==(\S+)", lock, re.MULTILINE)
    for need in map(Requirement, _metadata(installed).get_all("Requires-Dist")):
        if need.extras or need.marker and "eval" in str(need.marker):
            continue  # The lock of an extra of its own.
        versions = [version for name, version in pins if name == canonicalize_name(need.name)]
        assert versions, need
        assert all(need.specifier.contains(version) for version in versions), need


def test_a_run_from_the_wheel_saves_version_and_commit(installed, tmp_path):
    result = _run("-m", "xlstm_lm_cli", "--version", path=[installed])
    version, commit = re.match(r"xlstm-lm (\S+) \(commit (\S+)\)", result.stdout).groups()
    assert commit == (installed / "xlstm" / "COMMIT").read_text().strip()
    assert version == _metadata(installed)["Version"]
    words = "train --config=smoke --config.trainer.num_steps=2 --config.logger.sample_tokens=0"
    result = _run(
        *("-m", "xlstm_lm_cli", *words.split(), f"--workdir={tmp_path / 'run'}"), path=[installed]
    )
    assert result.returncode == 0, result.stderr
    info = json.loads((tmp_path / "run" / "checkpoints" / "2" / "run_info.json").read_text())
    code = info["run"]["code"]
    assert (code["xlstm"], code["commit"]) == (version, commit)


def test_texts_name_the_command_of_the_wheel(installed):
    result = _run("-m", "xlstm_lm_cli", "prepare_data", "--help", path=[installed])
    assert "xlstm-lm prepare_data --input=" in result.stdout
    assert "bazel" not in result.stdout


def test_the_command_lists_its_tools(installed):
    result = _run("-m", "xlstm_lm_cli", path=[installed])
    assert result.returncode == 0, result.stderr
    assert re.search("^  train  +Trains a language model.$", result.stdout, re.MULTILINE)
    assert len(re.findall("^  [a-z_]+ +[A-Z].*[.]$", result.stdout, re.MULTILINE)) >= 14


def test_a_mistyped_tool(installed):
    result = _run("-m", "xlstm_lm_cli", "trian", path=[installed])
    assert result.returncode == 2
    assert result.stderr == "error: xlstm-lm has no tool 'trian'; did you mean train?\n"


def _other_distribution(folder):
    """Writes another distribution with the package `xlstm` to a folder, as pip installs it."""
    package, info = folder / "xlstm", folder / "other_xlstm-2.0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-xlstm\nVersion: 2.0\n")
    (info / "RECORD").write_text("xlstm/__init__.py,,\nother_xlstm-2.0.dist-info/METADATA,,\n")


@pytest.mark.parametrize("place", ["before", "behind", "same"])
def test_another_distribution_of_the_import_name_is_named(wheel, tmp_path, place):
    ours, other = tmp_path / "ours", tmp_path / "other"
    zipfile.ZipFile(wheel).extractall(ours)
    _other_distribution(ours if place == "same" else other)
    path = {"before": [other, ours], "behind": [ours, other], "same": [ours]}[place]
    result = _run("-m", "xlstm_lm_cli", "train", path=path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "of the distribution other-xlstm 2.0, not the package of xlstm-lm" in line
    assert "pip uninstall other-xlstm" in line
    result = _run("-c", "import xlstm_lm", path=path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == line.replace("error", "ImportError")


def test_a_file_of_the_import_name_is_named(installed, tmp_path):
    (tmp_path / "xlstm.py").write_text("")
    result = _run("-m", "xlstm_lm_cli", "train", path=[tmp_path, installed])
    assert result.returncode == 2
    assert f"`import xlstm` finds {tmp_path / 'xlstm.py'}, not" in result.stderr


def test_a_folder_of_the_import_name_does_no_harm(installed, tmp_path):
    (tmp_path / "xlstm").mkdir()
    result = _run("-c", "import xlstm_lm, xlstm.files", path=[tmp_path, installed])
    assert result.returncode == 0, result.stderr


def test_a_damaged_installation(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract("xlstm_lm.py", tmp_path)
    zipfile.ZipFile(wheel).extract("xlstm_lm_cli.py", tmp_path)
    result = _run("-m", "xlstm_lm_cli", "train", path=[tmp_path])
    assert result.returncode == 2
    assert "the package xlstm is missing or incomplete: install xlstm-lm again" in result.stderr
