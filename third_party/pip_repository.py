"""A program that turns the packages that pip installed into a Bazel repository.

`pip_repository.bzl` runs it in the folder that holds `site-packages`:
python pip_repository.py INTERPRETER LOCK...

Every distribution becomes a `py_library` whose data are its own files and the files of all its
requirements. The requirements are listed in full because distributions may require each other,
which Bazel's `deps` cannot. A folder that belongs to one distribution is a single label: a test
then links about a hundred paths into its sandbox instead of ten thousand, and files with unusual
names never become labels.
"""

import compileall
import json
import py_compile
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_SITE = "site-packages"

_HEADER = """\
# Written by pip_repository.py.
load(":python_rules.bzl", "py_library", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "python3_runtime",
    interpreter = "python3",
    python_version = "PY3",
    stub_shebang = {shebang},
)

py_runtime_pair(
    name = "python_runtimes",
    py3_runtime = ":python3_runtime",
)

toolchain(
    name = "python_toolchain",
    toolchain = ":python_runtimes",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

_LIBRARY = """
py_library(
    name = {name},
    data = [
{data}
    ],
    imports = ["site-packages"],
)
"""

# No `site` (-S): the interpreter's own packages are not visible. No script folder on the path (-P):
# a module next to a program never hides one of the standard library.
_INTERPRETER = """\
#!/bin/sh
exec '{interpreter}' -S -P "$@"
"""


def installed(site: Path) -> dict[str, Distribution]:
    """Returns the distributions installed in the folder `site` by their canonical names."""
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=[str(site)])}


def own_paths(distribution_files: Mapping[str, Sequence[PurePosixPath]]) -> dict[str, list[str]]:
    """Returns the fewest paths that hold the files of each distribution and of no other.

    Args:
        distribution_files: for each distribution its files, relative to `site-packages`.

    Returns:
        For each distribution a sorted list of files and folders.
    """
    owners: dict[PurePosixPath, set[str]] = {}
    for name, files in distribution_files.items():
        for file in files:
            for path in (file, *file.parents[:-1]):
                owners.setdefault(path, set()).add(name)
    result = {}
    for name, files in distribution_files.items():
        mine = set()
        for file in files:
            from_the_top = (*reversed(file.parents[:-1]), file)
            mine.add(str(next((p for p in from_the_top if owners[p] == {name}), file)))
        result[name] = sorted(mine)
    return result


def requirements(packages: Mapping[str, Distribution], roots: Iterable[Requirement]) -> dict:
    """Returns for each distribution the names of all distributions it needs, including itself.

    Args:
        packages: the installed distributions by their canonical names.
        roots: what the locks request; a distribution has every extra that is requested anywhere.

    Raises:
        ValueError: a distribution that is required is not installed.
    """
    extras: dict[str, set[str]] = {name: {""} for name in packages}
    direct: dict[str, set[str]] = {name: set() for name in packages}
    unread = [(None, root) for root in roots]
    unread += [(name, need) for name in packages for need in _needs(packages[name], "")]
    while unread:
        user, need = unread.pop()
        name = canonicalize_name(need.name)
        if name not in packages:
            raise ValueError(f"{user or 'a lock'} requires {need}, which is not installed")
        if user:
            direct[user].add(name)
        for extra in need.extras - extras[name]:
            extras[name].add(extra)
            unread += [(name, further) for further in _needs(packages[name], extra)]
    return {name: _reachable(name, direct) for name in packages}


def _needs(distribution: Distribution, extra: str) -> list[Requirement]:
    """Returns the requirements of a distribution on this platform, with one extra or none ("")."""
    needs = [Requirement(line) for line in distribution.requires or []]
    return [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen, unread = {start}, [start]
    while unread:
        new = edges[unread.pop()] - seen
        seen |= new
        unread += new
    return seen


def locked_requirements(lock: str) -> list[Requirement]:
    """Returns the requirements in the text of one or more locks that apply to this platform."""
    lines = re.findall(r"^[A-Za-z0-9][^\\\n]*", lock, flags=re.MULTILINE)
    locked = [Requirement(line) for line in lines]
    return [r for r in locked if r.marker is None or r.marker.evaluate()]


def build_file(site: Path, lock: str, interpreter: str) -> str:
    """Returns the text of the BUILD file for the packages in the folder `site`."""
    packages = installed(site)
    files = {
        # Scripts are outside of `site-packages`; compiled files are added later.
        name: [f for f in d.files or [] if f.parts[0] != ".." and f.parent.name != "__pycache__"]
        for name, d in packages.items()
    }
    paths = own_paths(files)
    text = _HEADER.format(shebang=json.dumps(f"#!{interpreter} -S"))
    for name, needs in sorted(requirements(packages, locked_requirements(lock)).items()):
        data = sorted(f"{_SITE}/{path}" for need in needs for path in paths[need])
        label = name.replace("-", "_")
        lines = "\n".join(f"        {json.dumps(path)}," for path in data)
        text += _LIBRARY.format(name=json.dumps(label), data=lines)
    return text


def main(interpreter: str, *locks: str) -> None:
    """Writes the repository's files, and compiles the packages once for all tests."""
    site = Path(_SITE)
    # Bazel treats the folder of such a file as another package.
    for name in ("BUILD", "BUILD.bazel"):
        for file in site.rglob(name):
            if file.is_file():
                file.unlink()
    lock = "".join(Path(path).read_text() for path in locks)
    Path("BUILD").write_text(build_file(site, lock, interpreter))
    Path("python3").write_text(_INTERPRETER.format(interpreter=interpreter))
    Path("python3").chmod(0o755)
    # Unchecked, because nothing here changes later. What does not compile (templates, tests of
    # syntax errors) is not imported either.
    compileall.compile_dir(
        site,
        quiet=2,
        workers=0,
        rx=re.compile(r"[\\/]tests?[\\/]"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
