"""What must be the same in all processes of a run, for `check_agreement`."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from xlstm.dataset.data import Data
from xlstm.dataset.store_sample import sample_store
from xlstm.dataset.token_store import TokenStore
from xlstm.trainer.base.agreement import Facts
from xlstm.trainer.base.process_messages import num_processes
from xlstm.trainer.llm.code_version import package_versions, source_digests
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.workdir import plain_config

SAME_COMMAND = "start all processes with the same command"

# What changes numbers and is no flag of ours.
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
    """What a process runs on and with; no device is looked at."""
    # Where each process writes its dumps is its own business.
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
    """Which devices a process has."""
    devices = jax.local_devices()
    return {
        "give all processes as many devices of the same kind": {
            "devices": f"{len(devices)} x {devices[0].device_kind}"
        }
    }


def config_facts(config: RunConfig) -> Facts:
    """Every field of a configuration."""
    fields: dict[str, Any] = {
        f"{section}.{name}": value
        for section, values in plain_config(config).items()
        for name, value in values.items()
    }
    return {SAME_COMMAND: fields}


def data_facts(data: Data, stores: Sequence[TokenStore]) -> Facts:
    """What a run reads.

    Args:
        data: What it trains on.
        stores: All stores that it reads.
    """
    files = {
        os.path.join(store.path, name): description
        for store in stores
        for name, description in sample_store(store).items()
    }
    known = {"tokenizer": data.tokenizer.fingerprint, "checksums": data.checksums}
    return {"give all processes the same data": files | known}
