"""A public model, converted, evaluated, trained on and converted back, as a user does it."""

import json
import os

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file

from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.models.xlstm_parallel.hf_layout import hf_tensors, parameter_shapes, to_hf_config
from xlstm.testing.quick_compilation import QUICK_XLA_FLAGS
from xlstm.tools import convert, evaluate, train
from xlstm.tools.testing import start_tool

_FINE_TUNING = (
    "--config=finetune:imported",
    "--config.data.validation_fraction=0.0",
    "--config.data.context_length=16",
    "--config.trainer.num_steps=1",
    "--config.logger.tensorboard=False",
    "--config.logger.sample_tokens=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a public model of random numbers lies, stores of its tokenizer and one of another."""
    folder = tmp_path_factory.mktemp("convert")
    os.makedirs(folder / "public")
    rng = np.random.default_rng(0)
    model = ModelConfig(vocab_size=300, embedding_dim=16, num_blocks=2, num_heads=2)
    arrays = {
        tensor.name: rng.standard_normal(tensor.shape, dtype=np.float32)
        for tensor in hf_tensors(parameter_shapes(model))
    }
    save_file(arrays, folder / "public" / "model.safetensors")
    config = to_hf_config(model, BackendConfig(chunk_size=8), "float32")
    (folder / "public" / "config.json").write_text(json.dumps(config))
    tokenizer = write_tokenizer_json(folder / "public" / "tokenizer.json", words=["x = 1"])
    texts = [f"x{i} = {i}\n" * 40 for i in range(20)]
    for name in ("mine", "wiki"):
        write_store(folder / name, texts, load_tokenizer(tokenizer))
    write_store(folder / "bytes", texts)
    return folder


def _start(tool, folder, *words):
    env = {"BUILD_WORKING_DIRECTORY": str(folder), "XLA_FLAGS": QUICK_XLA_FLAGS}
    return start_tool(tool, *words, env=env)


def _finish(process):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def _error(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def _train(folder, workdir, *words):
    return _start(train, folder, f"--workdir={workdir}", *_FINE_TUNING, *words)


def test_from_a_public_model_to_another_one(folder):
    output = _finish(_start(convert, folder, "--from_hf=public", "--to=imported"))
    assert "parameters" in output and str(folder / "imported") in output

    mine = "--config.data.stores=mine", "--config.data.validation_stores=('wiki=wiki',)"
    training = _train(folder, "tuned", *mine)
    evaluation = _start(
        evaluate,
        folder,
        *("--checkpoint=imported", "--data=wiki=wiki", "--json=found.json", "--context_length=16"),
    )
    _finish(evaluation)
    output = _finish(training)
    assert f"beginning with the parameters in {folder / 'imported'}" in output
    found = json.loads((folder / "found.json").read_text())
    first, *_ = (folder / "tuned" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(first)
    assert first["step"] == 0
    assert first["val_loss_wiki"] == pytest.approx(found["val_loss_wiki"], rel=1e-5)

    # Another tokenizer, and the folder that holds no run; while the tuned model is exported.
    exporting = _start(convert, folder, "--from=tuned", "--to_hf=back")
    error = _error(_train(folder, "foreign", "--config.data.stores=bytes"))
    assert "another tokenizer (byte) than what the model was trained on (sha256:" in error
    assert not (folder / "foreign").exists()
    assert "1 file" in _finish(exporting)
    before, after = (load_file(folder / x / "model.safetensors") for x in ("public", "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():  # A warm-up begins with a learning rate of 0.
        assert after[name].tobytes() == array.tobytes()
    assert (folder / "back" / "tokenizer.json").exists()
    config = json.loads((folder / "back" / "config.json").read_text())
    assert config["eos_token_id"] == 0  # That of the marker.


def test_bad_input_is_one_line_and_status_2(folder):
    (folder / "taken").mkdir()
    taken = _start(convert, folder, "--from_hf=public", "--to=taken")
    assert "taken exists already: choose another folder" in _error(taken)
    assert not os.listdir(folder / "taken")


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "name both folders: --from_hf and --to, or --from and --to_hf"),
        ({"from_hf": "a", "to_hf": "b"}, "name both folders"),
        ({"from_hf": "a", "to": "b", "from": "c"}, "name both folders"),
        ({"from_hf": "/no/model", "to": "/b"}, "/no/model/config.json is missing"),
        ({"from": "/no/run", "to_hf": "/b"}, "/no/run: there is no whole checkpoint of a run"),
        ({"from": "a", "to_hf": "b", "max_shard_size": "5"}, "max_shard_size=5: expected a size"),
        ({"from": "a", "to_hf": "b", "max_shard_size": "0GB"}, "max_shard_size=0GB: expected"),
        ({"from_hf": "a", "to": "b", "dtype": "bfloat16"}, "are for --to_hf: ours are float32"),
    ],
    ids=str,
)
def test_flags(values, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["convert"])
    with flagsaver.flagsaver(), pytest.raises(ValueError, match=message):
        flags.FLAGS(["convert", *(f"--{name}={value}" for name, value in values.items())])
        convert.convert()
