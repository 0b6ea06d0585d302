"""Which code runs, and wrote a checkpoint."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
# Further ones that decide numbers or the order of data; not every one is there everywhere.
_OTHER_PACKAGES = (
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "numpy",
    "ml-dtypes",
    "grain",
    "tokenizers",
)


def code_version() -> dict[str, str]:
    """The git commit of this code, and the versions of Python and of the packages it rests on.

    Returns:
        Versions by name; `commit` ends in `+changes` if files differ from it, and is `unknown`
        outside of a git checkout.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"commit": _commit(), "python": platform.python_version(), **packages}


def package_versions() -> dict[str, str | None]:
    """The versions of Python and of every package that decides numbers; None: it is not there."""
    versions = {}
    for name in (*_PACKAGES, *_OTHER_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), **versions}


def source_digests() -> dict[str, str]:
    """Digests of our own modules that this process has loaded, by their path in the repository.

    Unlike the commit, they need no git and name the file that differs.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder)))
    digests = {}
    for module in list(sys.modules.values()):
        path = os.path.abspath(getattr(module, "__file__", None) or os.sep)
        if path.startswith(os.path.join(root, "xlstm", "")) and path.endswith(".py"):
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            digests[os.path.relpath(path, root)] = digest[:16]
    return dict(sorted(digests.items()))


def _commit() -> str:
    # Bazel runs links to the files of the checkout.
    folder = os.path.dirname(os.path.realpath(__file__))
    command = [
        "git",
        "-C",
        folder,
        "describe",
        "--always",
        "--abbrev=40",
        "--exclude=*",
        "--dirty=+changes",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
