"""Tests of memory and collectives of a step, and of the tool that prints them."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys

import jax
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.distributed.mesh import MeshConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.testing.lowered_products import lowered_products
from xlstm.tools import describe_step
from xlstm.tools.config import load_config, to_run_config
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh


def _memory(**sizes):
    config = RunConfig(
        model=ModelConfig(vocab_size=2048, embedding_dim=512, num_blocks=8, num_heads=8),
        backend=BackendConfig(chunk_size=16),
        mesh=MeshConfig(**{"dp": -1} | sizes),
        data=DataConfig(context_length=32, batch_size=32),
    )
    return describe_step.describe_step(config, create_run_mesh(config)).memory


@functools.cache
def _of_one_row(block, ratio, context_length, cp):
    """Describes a step in which `cp` devices share each row, and no other axis needs them."""
    config = RunConfig(
        model=ModelConfig(
            block=block,
            ratio=ratio,
            vocab_size=64,
            embedding_dim=64,
            num_blocks=2,
            num_heads=8,
            ffn_round_up_to_multiple_of=8,
        ),
        backend=BackendConfig(chunk_size=64),
        mesh=MeshConfig(cp=cp),
        data=DataConfig(context_length=context_length, batch_size=8 // cp),
    )
    return describe_step.describe_step(config, create_run_mesh(config))


def _over_cp(collectives):
    """Returns count and bytes of each kind of collective over `cp`, except for sums."""
    sent = {}
    for kind, axes, added_count, added_bytes in collectives:
        if "cp" in axes and kind != "all-reduce":
            count, num_bytes = sent.get(kind, (0, 0))
            sent[kind] = count + added_count, num_bytes + added_bytes
    return sent


@pytest.mark.parametrize("block, ratio", [("xlstm_7b", ""), ("xlstm_2024", "[1:1]")])
def test_only_slstm_layers_send_more_over_cp_in_longer_contexts(block, ratio):
    def sent(context_length):
        step = _of_one_row(block, ratio, context_length, 8)
        found = _over_cp((c.kind, c.axes, c.count, c.count * c.num_bytes) for c in step.collectives)
        assert found == _over_cp((t.kind, t.axes, t.count, t.num_bytes) for t in step.expected)
        return found

    short, long = sent(4096), sent(65536)
    assert set(short) == {"collective-permute"} | ({"all-to-all", "all-gather"} if ratio else set())
    for kind, (count, num_bytes) in short.items():
        growth = 1 if kind == "collective-permute" else 16
        assert long.pop(kind) == (count, growth * num_bytes)
    assert not long


def test_temporary_memory_is_divided_by_cp():
    sizes = [
        _of_one_row("xlstm_2024", "[1:1]", 65536, cp).memory["temporary"] for cp in (1, 2, 4, 8)
    ]
    for before, after in itertools.pairwise(sizes):
        assert after < 0.55 * before


@pytest.fixture(scope="module")
def replicated():
    return _memory(dp=8)


def test_replicas_hold_everything(replicated):
    # Float32, and two moments of AdamW: three times the parameters.
    assert replicated["parameters"] == 4 * 27_865_728
    assert replicated["optimizer state"] == pytest.approx(2 * replicated["parameters"], rel=1e-3)
    assert replicated["batch"] == 4 * 32 * (4 + 4 + 1 + 1)
    assert replicated["temporary"] > replicated["parameters"]  # The gradient, at least.


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tp": 8}, {"pp": 8}])
def test_parameters_and_optimizer_state_are_divided(replicated, sizes):
    memory = _memory(**sizes)
    for name in ("parameters", "optimizer state"):
        # All except the scales of norms and, over `fsdp`, gates.
        assert memory[name] / replicated[name] == pytest.approx(1 / 8, rel=0.02)
    assert memory["temporary"] < replicated["temporary"]


def test_a_step_multiplies_as_exactly_as_the_config_says():
    config = RunConfig(
        model=ModelConfig(num_blocks=4, ratio="[1:1]", matmul_precision="high"),
        mesh=MeshConfig(fsdp=2, tp=2, pp=2),
        data=DataConfig(context_length=48, batch_size=8),
        backend=BackendConfig(chunk_size=48),
    )
    _, _, lowered = describe_step.lower_step(config, create_run_mesh(config))
    products = lowered_products(lowered)
    # The sums over the pairs of tokens of a chunk are always exact.
    others = [product for product in products if product.operands[1] != "48x48xf32"]
    assert {product.precisions for product in others} == {("HIGH", "HIGH")}
    assert len(others) > 60


def test_a_step_of_7b_is_divided_and_nothing_is_allocated():
    values = load_config("xlstm:7B")
    values.mesh.update({"dp": 1, "fsdp": 4, "tp": 2})
    config = to_run_config(values)
    state, batch, lowered = describe_step.lower_step(config, create_run_mesh(config))

    def local_shape(x):
        return x.sharding.shard_shape(x.shape)

    params = unboxed(state.params)
    layer, ffn = params["blocks"]["mlstm_layer"], params["blocks"]["ffn"]
    assert local_shape(params["embeddings"]["embedding"]) == (50304 // 2, 4096 // 4)
    assert local_shape(params["lm_head"]["kernel"]) == (4096 // 4, 50304 // 2)
    assert local_shape(layer["q"]["kernel"]) == (32, 4096 // 4, 2048 // 2)
    assert local_shape(layer["out_proj"]["kernel"]) == (32, 4096 // 2, 4096 // 4)
    assert local_shape(layer["fgate_preact"]["bias"]) == (32, 8 // 2)
    assert local_shape(ffn["proj_up"]["kernel"]) == (32, 4096 // 4, 10944 // 2)
    assert local_shape(batch.inputs) == (512 // 4, 8192)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total == pytest.approx(3 * 4 * 6_865_424_896, rel=1e-6)  # AdamW's moments too.
    on_one = sum(math.prod(local_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert on_one == pytest.approx(total / 8, rel=0.01)

    # The state comes out as it goes in, and a block's weights and tokens are what a device has.
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, lowered.out_info[0]))
    assert shapes[0] == shapes[1]
    program = lowered.as_text()
    for shape in ("32x1024x5472xf32", "4096x5472xf32", "128x4096x4096xbf16"):
        assert f"tensor<{shape}>" in program
    assert "tensor<4096x10944xf32>" not in program
    assert sum(x.nbytes for x in jax.live_arrays()) < 2**20


def _advice(cp=1, **gib):
    config = RunConfig(data=DataConfig(context_length=8192, batch_size=512))
    mesh = create_run_mesh(dataclasses.replace(config, mesh=MeshConfig(fsdp=4, cp=cp)))
    sizes = {"parameters": 1, "optimizer state": 2, "temporary": 4} | gib
    return describe_step.memory_advice(
        config, mesh, {name: size * 2**30 for name, size in sizes.items()}
    )


def test_a_step_that_fits_needs_no_advice():
    assert _advice() == ""
    assert _advice(temporary=70) == ""


def test_the_fields_that_lower_the_memory_are_named():
    text = _advice(temporary=3143)
    assert text.startswith("A device needs 3,146.0 GiB, more than the 80 GB of an accelerator")
    assert "the 64 x 8,192 tokens that a device computes at once" in text
    for field in ("data.batch_size", "trainer.num_minibatches", "model.remat=block", "mesh.fsdp"):
        assert field in text
    assert "raise mesh.cp" in text
    assert "the 128 x 4,096 tokens that a device computes" in _advice(cp=2, temporary=3143)
    assert "optimizer state (" not in text and "mesh.tp" not in text
    text = _advice(parameters=30, **{"optimizer state": 60})
    assert "parameters and optimizer state (90.0 GiB)" in text and "mesh.tp" in text
    assert "data.batch_size" not in text


def test_the_tool_prints_tables():
    process = subprocess.run(
        [
            *(sys.executable, "-m", describe_step.__name__, "--config=smoke"),
            *("--simulate_devices=8", "--config.mesh.pp=2", "--config.mesh.tp=2"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
        check=True,
    )
    lines = [line.split() for line in process.stdout.splitlines()]
    assert "mesh: dp=2, fsdp=1, pp=2, cp=1, tp=2 (8 CPU devices)" in process.stdout
    assert "\nmLSTM: XLA program, chunks of 16 tokens (not mosaic: it needs a " in process.stdout
    assert "pipeline bubble: 33%" in process.stdout
    # 42,064 of 42,224 float32 parameters are sharded over four devices, 128 over two, 32 over none.
    assert [line[1:] for line in lines if line[:1] == ["parameters"]] == [["41.5", "KiB"]]
    # Two gathers and two scatters per block, their transposes and recomputations, in each of three
    # ticks; and those of embedding and head.
    assert [line[2:4] for line in lines if line[:2] == ["tp", "all-gather"]] == [["20", "20"]]
    assert [line[2:4] for line in lines if line[:2] == ["tp", "reduce-scatter"]] == [["14", "14"]]


def test_a_mesh_that_does_not_fit_is_refused():
    process = subprocess.run(
        [
            *(sys.executable, "-m", describe_step.__name__, "--config=smoke"),
            *("--simulate_devices=8", "--config.mesh.tp=8"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "error: model.num_heads=4 does not divide over mesh.tp=8" in process.stderr
