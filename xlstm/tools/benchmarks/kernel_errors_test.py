import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from xlstm.testing.patience import PATIENCE
from xlstm.tools import processes
from xlstm.tools.benchmarks import kernel_report

# Compiles the kernel of a pass for an H100, as a part of a program.
TOOL = f"""
import jax, jax.numpy as jnp, sys
from jax.sharding import SingleDeviceSharding
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import decayed_attention_hopper
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import *
from xlstm.tools.benchmarks.candidates import Shape
from {kernel_report.__name__} import h100, passes
from xlstm.tools.command_line import run

def main(argv):
    device, shape = h100(), Shape(1, 2, 128, 64, 128)
    (item,) = (item for item in passes(shape) if item.name == argv[1])
    choose_implementation("auto", Device("gpu", device.device_kind), jnp.bfloat16, *shape[3:])
    sharding = SingleDeviceSharding(device)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), item.inputs
    )
    jax.jit(lambda x: decayed_attention_hopper(x, item.options)).lower(inputs).compile()

run(main)
"""


def _ptxas():
    """Returns the compiler that JAX finds."""
    if found := shutil.which("ptxas"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for package in ("cu13", "cuda_nvcc"):
            path = os.path.join(folder, package, "bin", "ptxas")
            if os.path.exists(path):
                return path
    return None


@pytest.fixture
def compile_pass(tmp_path):
    """Compiles the kernel of a pass, with a compiler that cannot compile anything."""
    if not (ptxas := _ptxas()) or not any(map(importlib.util.find_spec, kernel_report._PLUGINS)):
        pytest.skip("needs JAX's CUDA plugin, and ptxas")
    script = tmp_path / "ptxas"
    # It answers what it is asked about itself.
    script.write_text(
        f"""#!/bin/sh
case "$*" in *--version*|*--input-as-string*) exec {ptxas} "$@";; esac
echo "ptxas fatal   : no registers are left" >&2
exit 1
"""
    )
    script.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, sys.path))

    def run(name):
        return subprocess.run(
            [sys.executable, "-c", TOOL, name],
            env={**os.environ, "PATH": path, "PYTHONPATH": modules},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


@pytest.mark.parametrize("name", ["forward", "dv"])
def test_a_kernel_that_does_not_compile_is_one_line_and_status_2(compile_pass, name):
    result = compile_pass(name)
    assert result.returncode == 2, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "heads of DHQK=64, DHV=128 in bfloat16" in line
    assert "ptxas fatal : no registers are left); set backend.implementation=xla" in line
    assert "Traceback" not in result.stderr


def test_the_processes_of_a_run_hear_of_it():
    status, message = processes._explain(RuntimeError("Mosaic GPU pass pipeline failed"))
    assert status == 2 and "set backend.implementation=xla" in message
