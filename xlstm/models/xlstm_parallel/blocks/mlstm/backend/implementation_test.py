import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import implementation
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    Device,
    choose_implementation,
    current_device,
    interpreted_kernels,
)

H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
HEADS = 256, 512


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_hopper_gpus_take_the_kernels(kind):
    device = Device("gpu", kind)
    assert choose_implementation("auto", device, jnp.bfloat16, *HEADS) == ("mosaic", "")


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "reason"),
    [
        (Device("gpu", "NVIDIA A100-SXM4-80GB"), jnp.bfloat16, HEADS, "Hopper.*A100"),
        (Device("gpu", "NVIDIA B200"), jnp.bfloat16, HEADS, "Hopper.*B200"),
        (Device("tpu", "TPU v5p"), jnp.bfloat16, HEADS, "Hopper.*TPU v5p"),
        (Device("cpu", "cpu"), jnp.bfloat16, HEADS, "Hopper.*cpu"),
        (H100, jnp.float32, HEADS, "bfloat16 or float16.*they are float32"),
        (H100, jnp.bfloat16, (256, 1024), "at most 512 features, and DHQK=256, DHV=1024"),
    ],
)
def test_elsewhere_the_xla_program_is_taken_and_the_kernels_cannot_be_asked_for(
    device, dtype, heads, reason
):
    chosen = choose_implementation("auto", device, dtype, *heads)
    assert chosen.name == "xla"
    with pytest.raises(ValueError, match=f"implementation=mosaic cannot be used: .*{reason}"):
        choose_implementation("mosaic", device, dtype, *heads)
    assert chosen.reason


def test_a_machine_that_cannot_compile_kernels_takes_the_xla_program(monkeypatch):
    monkeypatch.setattr(
        jax, "default_backend", lambda: "gpu"
    )  # It compiles for the CPU, and fails.
    implementation._compile_problem.cache_clear()
    chosen = choose_implementation("auto", H100, jnp.bfloat16, *HEADS)
    implementation._compile_problem.cache_clear()
    assert chosen.name == "xla"
    assert re.fullmatch(r"its smallest kernel does not compile here \(\w+: .+\)", chosen.reason)


def test_the_xla_program_can_be_asked_for_anywhere():
    assert choose_implementation("xla", H100, jnp.bfloat16, *HEADS) == ("xla", "")


def test_interpreted_kernels_run_anywhere():
    with interpreted_kernels():
        assert choose_implementation("mosaic", Device("cpu", "cpu"), jnp.bfloat16, *HEADS).name


def test_the_device_is_that_of_the_mesh():
    mesh, seen = Mesh(np.array(jax.devices()[:1]), ("x",)), []

    def spy(x):
        seen.append(current_device())
        return x

    spec = PartitionSpec("x")
    jax.eval_shape(jax.shard_map(spy, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones(1))
    assert seen == [current_device()] == [Device(jax.devices()[0].platform, "cpu")]
