"""Tests of loading a run from Python, on other devices than those that wrote it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.testing import write_store
from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.inference.generate import encode_prompt
from xlstm.inference.load_model import load_run
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.language_model import create_training
from xlstm.trainer.llm.train import train_language_model
from xlstm.trainer.llm.workdir import Workdir, run_info, write_config
from xlstm.trainer.logger.base_logger import LoggerConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig

CONFIG = RunConfig(
    model=ModelConfig(
        embedding_dim=16, num_blocks=2, num_heads=2, ffn_round_up_to_multiple_of=8, vocab_size=256
    ),
    mesh=MeshConfig(fsdp=2, tp=2, fsdp_min_weight_size=64),
    data=DataConfig(context_length=16, batch_size=8, validation_fraction=0.0),
    schedule=ScheduleConfig(warmup_steps=1, decay="constant", decay_steps=2, peak_lr=1e-2),
    trainer=TrainerConfig(num_steps=3),
    logger=LoggerConfig(tensorboard=False, sample_tokens=0),
)
TEXT = "x1 = 1\nx"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was trained on a mesh of four devices, or of eight."""
    folder = tmp_path_factory.mktemp("trained")
    write_store(folder / "store", [f"x{i} = {i}\n" * 40 for i in range(40)])
    data = dataclasses.replace(CONFIG.data, stores=(str(folder / "store"),))
    train_language_model(dataclasses.replace(CONFIG, data=data), str(folder / "run"))
    return str(folder / "run")


def write_run(folder, devices, tokenizer):
    """Writes the folder of a run on a mesh of some devices; returns its parameters on the host."""
    workdir, config = Workdir(str(folder)), dataclasses.replace(CONFIG, mesh=MeshConfig())
    mesh = create_mesh(config.mesh, devices)
    state, _, _ = create_training(config, mesh)
    info = run_info(config, ["corpus"], tokenizer, {}, mesh.shape)
    with Checkpointer(workdir.checkpoints, max_to_keep=1, run_info=info) as checkpointer:
        checkpointer.save(1, state)
    write_config(workdir, config, ["corpus"])
    return jax.device_get(unboxed(state.params))


@pytest.fixture(scope="module")
def of_one_device(tmp_path_factory):
    """The folder of a run that was written on one device, and its parameters."""
    folder = tmp_path_factory.mktemp("of_one_device") / "run"
    params = write_run(folder, jax.devices()[:1], ByteTokenizer())
    return str(folder), params


def test_a_run_of_four_devices_on_one_and_on_other_meshes(trained):
    run = load_run(trained, devices=jax.devices()[:1])
    assert (run.step, run.workdir.path, run.mesh.size) == (3, trained, 1)
    assert isinstance(run.tokenizer, ByteTokenizer)
    assert run.run_config.model == run.config.model == CONFIG.model
    text, logits = run.generate(TEXT, max_tokens=9, temperature=0), run.logits(TEXT)
    assert logits.shape == (1 + len(TEXT), 256)  # With the begin-of-document id.
    assert 0 < len(text) <= 9
    for mesh in ({}, {"tp": 2, "fsdp": 2}, {"pp": 2, "tp": -1, "dp": 1}):
        other = load_run(f"{trained}/checkpoints/3", mesh=mesh, devices=jax.devices()[:4])
        assert other.mesh.size == 4 and other.fingerprint == run.fingerprint
        np.testing.assert_allclose(other.logits(TEXT), logits, atol=1e-4)
        assert other.generate(TEXT, max_tokens=9, temperature=0) == text


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}])
def test_a_run_of_one_device_on_four(of_one_device, mesh):
    folder, params = of_one_device
    run = load_run(folder, mesh=mesh, devices=jax.devices()[:4])
    assert run.mesh.size == 4
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), params)
    tokens = np.array([[0, 97, 98], [0, 99, 100], [0, 97, 97], [0, 9, 9]])
    expected = xLSTMLMModel(run.config).apply({"params": params}, tokens)
    np.testing.assert_allclose(run.logits(tokens), expected, atol=1e-4)
    np.testing.assert_allclose(run.logits(tokens[2]), expected[2], atol=1e-4)


@pytest.mark.parametrize("saved, loaded", [("mosaic", "auto"), ("xla", "xla")])
def test_a_demand_for_kernels_ends_with_the_training(of_one_device, tmp_path, saved, loaded):
    folder, _ = of_one_device
    shutil.copytree(folder, tmp_path / "run")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["config"]["backend"]["implementation"] = saved
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    run = load_run(str(tmp_path / "run"))
    assert run.run_config.backend.implementation == loaded
    np.testing.assert_allclose(run.logits(TEXT), load_run(folder).logits(TEXT), atol=1e-4)


def test_text_and_ids_are_the_same_prompt(trained):
    run = load_run(trained, devices=jax.devices()[:1])
    ids = encode_prompt(run, TEXT)
    np.testing.assert_array_equal(run.logits(TEXT), run.logits(ids))
    options = {"max_tokens": 9, "seed": 3, "top_k": 5}
    assert run.generate(ids, **options) == run.generate(TEXT, **options)
    assert run.generate(TEXT, 9, stop_strings=[" "], seed=3, top_k=5).count(" ") == 0


def test_a_run_without_a_tokenizer_has_ids(tmp_path):
    write_run(tmp_path / "run", jax.devices()[:1], None)
    run = load_run(str(tmp_path / "run"))
    assert run.logits([0, 1]).shape == (2, 256)
    for use in (run.logits, run.generate):
        with pytest.raises(ValueError, match="run has no tokenizer: use token ids"):
            use("x")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "prompt 0 is empty: expected at least one token"),
        ([0, 256], "prompt 0 has the token id 256: expected ids from 0 to 255"),
        ([[0], [-1]], "prompt 1 has the token id -1: expected ids from 0 to 255"),
    ],
)
def test_bad_prompts(of_one_device, prompt, message):
    run = load_run(of_one_device[0])
    with pytest.raises(ValueError, match=f"^{message}$"):
        run.logits(prompt)


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "nowhere does not exist: expected the folder of a run or of one of its"),
        ("run/checkpoints/7", "7 does not exist: expected the folder of a run or of one of its"),
        ("empty", "empty has no complete checkpoint: expected the folder of a run or of one of"),
        ("empty/checkpoints/5", "5 is not a complete checkpoint: expected the folder of a run"),
    ],
)
def test_folders_that_are_no_run(tmp_path, path, message):
    (tmp_path / "empty" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(str(tmp_path / path))
    assert "\n" not in str(caught.value)


def test_meshes_that_do_not_fit(of_one_device):
    with pytest.raises(ValueError, match="mesh has the axis 'model': expected axes among dp, fsdp"):
        load_run(of_one_device[0], mesh={"model": 2})
    with pytest.raises(ValueError, match="model.num_heads=2 does not divide over mesh.tp=4"):
        load_run(of_one_device[0], mesh={"tp": 4})
