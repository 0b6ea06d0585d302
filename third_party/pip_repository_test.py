import re
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

from third_party import pip_repository

_HERE = Path(__file__).parent
_LOCKS = {path.stem: path.read_text() for path in sorted(_HERE.glob("requirements*.txt"))}
_ADDITIONS = [name.removeprefix("requirements_") for name in _LOCKS if "_" in name]


def _install(site, name, files=(), requires=()):
    """Writes what pip writes: files, and the metadata that list them."""
    info = f"{name}-1.0.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (site / info).mkdir(parents=True)
    (site / info / "METADATA").write_text("\n".join(lines) + "\n")
    record = [*files, f"{info}/METADATA", f"{info}/RECORD"]
    (site / info / "RECORD").write_text("".join(f"{file},,\n" for file in record))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()


def test_a_folder_of_ones_own_is_one_path():
    files = {
        "one": ["one/a.py", "one/deep/b c.py", "shared/one/x.py", "shared/y.py", "single.py"],
        "two": ["shared/two/x.py"],
    }
    files = {name: [PurePosixPath(path) for path in paths] for name, paths in files.items()}
    paths = pip_repository.own_paths(files)
    assert paths["one"] == ["one", "shared/one", "shared/y.py", "single.py"]
    assert paths["two"] == ["shared/two"]


def test_requirements_follow_markers_extras_and_cycles(tmp_path):
    _install(tmp_path, "Top.Level", requires=["middle[fast]", 'never; python_version < "3"'])
    _install(tmp_path, "middle", requires=["bottom", 'quick; extra == "fast"', 'no; extra == "x"'])
    _install(tmp_path, "bottom", requires=["middle"])
    _install(tmp_path, "quick")
    needs = pip_repository.requirements(pip_repository.installed(tmp_path), [])
    assert needs["top-level"] == {"top-level", "middle", "bottom", "quick"}
    assert needs["bottom"] == {"middle", "bottom", "quick"}
    assert needs["quick"] == {"quick"}


def test_an_extra_that_only_the_lock_names(tmp_path):
    _install(tmp_path, "array", requires=['gpu; extra == "cuda"'])
    _install(tmp_path, "gpu")
    packages = pip_repository.installed(tmp_path)
    assert pip_repository.requirements(packages, [])["array"] == {"array"}
    needs = pip_repository.requirements(packages, [Requirement("array[cuda]==1.0")])
    assert needs["array"] == {"array", "gpu"}


def test_a_missing_requirement_is_named(tmp_path):
    _install(tmp_path, "one", requires=["two>=2"])
    with pytest.raises(ValueError, match="one requires two>=2, which is not installed"):
        pip_repository.requirements(pip_repository.installed(tmp_path), [])


def test_locked_requirements_of_this_platform():
    lock = (
        "# A comment.\n"
        'one[x]==1.0 ; python_version >= "3" \\\n    --hash=sha256:00\n'
        'two==2.0 ; python_version < "3" \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n'
    )
    (one,) = pip_repository.locked_requirements(lock)
    assert (one.name, one.extras) == ("one", {"x"})


def test_build_file_has_a_library_for_each_distribution(tmp_path):
    site = tmp_path / "lib" / "site-packages"
    _install(site, "Some.Name", ["some/__init__.py", "../../bin/some", "__pycache__/x.pyc"])
    text = pip_repository.build_file(site, "some-name==1.0\n", "/opt/python3")
    assert 'name = "some_name"' in text
    assert '"site-packages/some"' in text and '"site-packages/Some.Name-1.0.dist-info"' in text
    assert "bin" not in text.split("py_library", 1)[1] and "pycache" not in text
    assert '"#!/opt/python3 -S"' in text


def test_two_locks_are_read_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _install(tmp_path / "site-packages", "array", requires=['plugin; extra == "card"'])
    _install(tmp_path / "site-packages", "plugin", ["plugin.py"])
    Path("lock.txt").write_text("array==1.0\n")
    Path("lock_card.txt").write_text("array[card]==1.0\nplugin==1.0\n")
    uses = []
    for locks in (["lock.txt"], ["lock.txt", "lock_card.txt"]):
        pip_repository.main("/opt/python3", *locks)
        array = Path("BUILD").read_text().split("py_library(")[1]
        uses.append('"site-packages/plugin.py"' in array)
    assert uses == [False, True]


def _pins(lock, marker=""):
    """Returns the pins of a lock without extras, and the names of the packages."""
    pattern = rf"^([a-z0-9-]+)(?:\[.*\])?(==.*{re.escape(marker)}) \\$"
    pins = re.findall(pattern, lock, flags=re.MULTILINE)
    return {name + version for name, version in pins}, {name for name, _ in pins}


@pytest.mark.parametrize("addition", _ADDITIONS)
def test_a_further_lock_adds_to_the_packages_and_changes_none(addition):
    pins, names = _pins(_LOCKS["requirements"])
    its_pins, its_names = _pins(_LOCKS[f"requirements_{addition}"])
    for_windows = _pins(_LOCKS["requirements"], " ; sys_platform == 'win32'")[1]
    shared = its_names & names
    assert shared <= {"jax"} | for_windows
    assert {pin for pin in its_pins if pin.startswith("jax==")} <= pins
    assert len(its_names) > 1


def test_every_package_without_a_wheel_is_built_with_the_locked_setuptools():
    for name, lock in _LOCKS.items():
        built = re.findall("^--no-binary (.*)$", lock, re.MULTILINE)
        assert set(built) <= _pins(lock)[1]
        assert not built or "setuptools" in _pins(lock)[1], name


def test_every_lock_has_a_config_of_its_name():
    configs = dict(
        re.findall(r"^common:(\w+) (.*)$", (_HERE.parent / ".bazelrc").read_text(), re.MULTILINE)
    )
    assert {"cuda12", "cuda13", "eval", "tpu"} <= set(_ADDITIONS)
    assert configs.pop("cuda").removeprefix("--config=") in configs
    assert configs == {name: f"--repo_env=XLSTM_REQUIREMENTS={name}" for name in _ADDITIONS}
