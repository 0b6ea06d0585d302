from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement

from third_party import pip_repository


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
