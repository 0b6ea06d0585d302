"""Facts about a run that its processes compare and its checkpoints save: code, config, data."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import jax

from xlstm.dataset.data import Data
from xlstm.dataset.store_sample import sample_store
from xlstm.dataset.token_store import TokenStore
from xlstm.files import file_checksum
from xlstm.installation import VERSION, commit
from xlstm.trainer.base.coordinator import Facts, num_processes
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.workdir import plain_config

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
# Further packages that affect results or the order of the data; not all are always installed.
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
    """Returns the versions of this code, of Python and of the main packages.

    Returns:
        Versions by name. `xlstm` is the version of this code, `commit` its git commit, see
        `xlstm.installation`.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "xlstm": VERSION,
        "commit": commit(),
        "python": platform.python_version(),
        **packages,
    }


def package_versions() -> dict[str, str | None]:
    """Returns the versions of Python and of all packages that affect results; None if missing."""
    versions = {}
    for name in (*_PACKAGES, *_OTHER_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), **versions}


def source_digests() -> dict[str, str]:
    """Returns digests of the modules of `xlstm` that this process has loaded, by their path.

    Unlike the commit, they do not need git, and they show which file differs. Paths are relative to
    the root of the repository.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder)))
    digests = {}
    for module in list(sys.modules.values()):
        path = os.path.abspath(getattr(module, "__file__", None) or os.sep)
        if path.startswith(os.path.join(root, "xlstm", "")) and path.endswith(".py"):
            digests[os.path.relpath(path, root)] = file_checksum(path).sha256[:16]
    return dict(sorted(digests.items()))


SAME_COMMAND = "start all processes with the same command"

# Options and variables that affect results, but are not flags of `train`.
_JAX_OPTIONS = (
    "jax_platforms",
    "jax_num_cpu_devices",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
)
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def environment_facts() -> Facts:
    """Returns the packages, code and environment of this process, without looking at devices."""
    # Processes may dump to different folders.
    xla_flags = [x for x in os.environ.get("XLA_FLAGS", "").split() if "xla_dump" not in x]
    options = {name: getattr(jax.config, name) for name in _JAX_OPTIONS}
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    return {
        "install the same packages for all processes": package_versions(),
        "give all processes the same code": source_digests(),
        "give all processes the same environment": {
            "num_processes": num_processes(),
            "XLA_FLAGS": " ".join(sorted(xla_flags)),
        }
        | options
        | variables,
    }


def device_facts() -> Facts:
    """Returns the number and kind of this process's devices."""
    devices = jax.local_devices()
    return {
        "give all processes as many devices of the same kind": {
            "devices": f"{len(devices)} x {devices[0].device_kind}"
        }
    }


def config_facts(config: RunConfig) -> Facts:
    """Returns every field of a configuration."""
    fields: dict[str, Any] = {
        f"{section}.{name}": value
        for section, values in plain_config(config).items()
        for name, value in values.items()
    }
    return {SAME_COMMAND: fields}


def data_facts(data: Data, stores: Sequence[TokenStore]) -> Facts:
    """Returns samples of the files that a run reads, its tokenizer, and checksums of its data.

    Args:
        data: Training data of the run.
        stores: All token stores that the run reads.
    """
    files = {
        os.path.join(store.path, name): description
        for store in stores
        for name, description in sample_store(store).items()
    }
    known = {"tokenizer": data.tokenizer.fingerprint, "checksums": data.checksums}
    return {"give all processes the same data": files | known}
