import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import hopper_plan
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import Inputs, Options
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import decayed_attention_hopper
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import Tiling
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    Device,
    choose_implementation,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.kernel_errors import kernel_problem

COMPILER = "INTERNAL: Mosaic GPU pass pipeline failed: 'gpu.binary' op ptxas exited"


@pytest.fixture(autouse=True)
def chosen():
    device = Device("gpu", "NVIDIA H100 80GB HBM3")
    choose_implementation("auto", device, jnp.bfloat16, 128, 256)
    choose_implementation("auto", device, jnp.float16, 64, 128)
    choose_implementation("auto", device, jnp.float32, 32, 64)  # Takes the XLA program.


def test_an_error_of_the_compiler_names_heads_type_and_field():
    assert kernel_problem(jax.errors.JaxRuntimeError(f"{COMPILER}:\n\n  no registers\n")) == (
        "a kernel of the mLSTM, for heads of DHQK=64, DHV=128 in float16, does not compile or run"
        f" (JaxRuntimeError: {COMPILER}: no registers); set backend.implementation=xla, for a saved"
        " run in its config.json"
    )


def test_a_page_of_the_compiler_is_shortened():
    problem = kernel_problem(jax.errors.JaxRuntimeError(COMPILER + " and so on" * 1000))
    assert "and so on and so on" in problem and " ...); set" in problem and len(problem) < 600


def _lower():
    tokens = jax.ShapeDtypeStruct((1, 128, 64), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((1, 2, 8, 64), jnp.float32)
    inputs = Inputs(tokens, tokens, tokens, gates, jax.ShapeDtypeStruct((1, 2), jnp.float32))
    traced = jax.jit(lambda x: decayed_attention_hopper(x, Options()).out).trace(inputs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_kernels_have_names():
    assert "mlstm_64x64_out" in _lower()


def test_a_kernel_that_cannot_be_traced(monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("not on Tuesdays")

    monkeypatch.setattr(plgpu, "wgmma", fail)
    with pytest.raises(NotImplementedError) as caught:
        _lower()
    problem = kernel_problem(caught.value)
    assert "(NotImplementedError: not on Tuesdays); set backend.implementation=xla" in problem


def test_a_kernel_that_cannot_be_lowered(monkeypatch):
    monkeypatch.setattr(hopper_plan, "choose_tiling", lambda *args: Tiling(32, 16, 16, 16))
    with pytest.raises(ValueError, match="shared memory") as caught:
        _lower()
    assert "shared memory: smem_bytes=" in kernel_problem(caught.value)


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OSError("Mosaic GPU.txt")],
    ids=str,
)
def test_other_errors(error):
    assert kernel_problem(error) == ""


def test_an_error_of_a_program_beside_the_kernels():
    with pytest.raises(TypeError) as caught:
        jax.jit(lambda x: jnp.zeros(2) @ jnp.zeros(3))(1)
    assert kernel_problem(caught.value) == ""
