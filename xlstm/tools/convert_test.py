"""Tests of the tool `convert`: a model is imported, evaluated, fine-tuned and exported again."""

import dataclasses
import json
import os

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file

from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.huggingface.layout import hf_tensors, parameter_shapes, to_hf_config
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.testing.patience import PATIENCE
from xlstm.tools import convert, evaluate
from xlstm.tools.config import load_config, to_run_config
from xlstm.tools.testing.start_tool import start_tool
from xlstm.trainer.base.trainer import fit
from xlstm.trainer.llm.train import open_training

# Files of a Hugging Face model besides its tokenizer, configuration and tensors.
_FILES = {
    "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "bos_token": "<s>", "extra": 1}',
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": json.dumps(
        {"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": 2, "temperature": 0.6}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random Hugging Face model, `hf`, and token stores of its tokenizer."""
    folder = tmp_path_factory.mktemp("convert")
    os.makedirs(folder / "hf")
    rng = np.random.default_rng(0)
    model = ModelConfig(vocab_size=300, embedding_dim=16, num_blocks=2, num_heads=2)
    arrays = {
        tensor.name: rng.standard_normal(tensor.shape, dtype=np.float32)
        for tensor in hf_tensors(parameter_shapes(model))
    }
    save_file(arrays, folder / "hf" / "model.safetensors")
    config = to_hf_config(model, BackendConfig(chunk_size=8), "float32")
    config["tie_word_embeddings"] = True  # Not true: both tensors are in the file.
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    special = ["<|endoftext|>", "<s>", "<|im_end|>"]
    write_tokenizer_json(folder / "hf" / "tokenizer.json", special, words=["x = 1"])
    for name, content in _FILES.items():
        (folder / "hf" / name).write_text(content)
    tokenizer = load_tokenizer(str(folder / "hf"))
    assert (tokenizer.bos_id, tokenizer.eod_id) == (1, 0)
    texts = [f"x{i} = {i}\n" * 40 for i in range(20)]
    for name in ("mine", "wiki"):
        write_store(folder / name, texts, tokenizer)
    return folder


def _start(tool, folder, *words):
    env = {"BUILD_WORKING_DIRECTORY": str(folder)}
    return start_tool(tool, *words, env=env)


def _finish(process):
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def _error(process):
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def _fine_tuning(folder):
    """Returns the configuration of `train --config=finetune:imported`, on the folder's data."""
    config = to_run_config(load_config(f"finetune:{folder / 'imported'}"))
    data = dataclasses.replace(
        config.data,
        stores=(str(folder / "mine"),),
        validation_fraction=0.0,
        validation_stores=(f"wiki={folder / 'wiki'}",),
        context_length=16,
    )
    return dataclasses.replace(
        config, data=data, logger=dataclasses.replace(config.logger, tensorboard=False)
    )


def _convert(**values):
    """Converts in this process with these values of flags."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["convert"])
    with flagsaver.flagsaver():
        flags.FLAGS(["convert", *(f"--{name}={value}" for name, value in values.items())])
        return convert.convert()


def test_from_a_hugging_face_model_to_another_one(folder):
    (folder / "taken").mkdir()
    taken = _start(convert, folder, "--from_hf=hf", "--to=taken")
    imported = _start(convert, folder, "--from_hf=hf", "--to=imported")
    output, errors = imported.communicate(timeout=PATIENCE)
    assert imported.returncode == 0, errors
    notes = errors.splitlines()
    assert notes[0].startswith("note: tie_word_embeddings=True has no effect")
    assert notes[1:] == [
        "note: the token at the end of a text is '<|endoftext|>', as tokenizer_config.json says;"
        " but generation_config.json says '<|im_end|>' or '<s>'"
    ]
    assert "parameters" in output and str(folder / "imported") in output
    assert "taken exists already: choose another folder" in _error(taken)
    assert not os.listdir(folder / "taken")

    words = "--checkpoint=imported", "--data=wiki=wiki", "--json=found.json", "--context_length=16"
    evaluation = _start(evaluate, folder, *words)
    with open_training(_fine_tuning(folder), str(folder / "tuned")) as run:
        fit(  # Evaluates before the first step.
            run.state,
            run.batches_from,
            run.train_step,
            start_step=0,
            num_steps=0,
            callbacks=run.callbacks,
            clock=run.clock,
        )
        run.checkpointer.save(1, run.state)
    _finish(evaluation)
    found = json.loads((folder / "found.json").read_text())
    (first,) = (folder / "tuned" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(first)
    assert first["step"] == found["step"] == 0
    assert first["val_loss_wiki"] == pytest.approx(found["val_loss_wiki"], rel=1e-5)

    summary, _ = _convert(**{"from": folder / "tuned", "to_hf": folder / "back"})
    assert summary.num_files == 1
    before, after = (load_file(folder / x / "model.safetensors") for x in ("hf", "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].tobytes() == array.tobytes()
    # The export of the untrained copy has the same files as a round trip.
    _convert(**{"from": folder / "imported", "to_hf": folder / "direct"})
    names = set(os.listdir(folder / "direct"))
    assert names == set(os.listdir(folder / "back")) == set(os.listdir(folder / "hf"))
    for name in names:
        assert (folder / "back" / name).read_bytes() == (folder / "direct" / name).read_bytes()
    for name, content in _FILES.items():
        if name.endswith(".json"):
            assert json.loads((folder / "back" / name).read_text()) == json.loads(content)
        else:
            assert (folder / "back" / name).read_text() == content
    config = json.loads((folder / "back" / "config.json").read_text())
    ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ids == [1, [2, 1], 2]


def test_the_end_marker_may_be_decided(folder):
    _convert(from_hf=folder / "hf", to=folder / "decided", eod_token="<|im_end|>")
    tokenizer = load_tokenizer(str(folder / "decided"))
    assert (tokenizer.bos_id, tokenizer.eod_id) == (1, 2)
    with pytest.raises(ValueError, match="looked for 'no such'"):
        _convert(from_hf=folder / "hf", to=folder / "none", eod_token="no such")


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "expected two folders: --from_hf and --to, or --from and --to_hf"),
        ({"from_hf": "a", "to_hf": "b"}, "expected two folders"),
        ({"from_hf": "a", "to": "b", "from": "c"}, "expected two folders"),
        ({"from_hf": "/no/model", "to": "/b"}, "/no/model/config.json is missing"),
        (
            {"from": "/no/run", "to_hf": "/b"},
            "/no/run does not exist: expected",
        ),
        ({"from": "a", "to_hf": "b", "max_shard_size": "5"}, "max_shard_size=5: expected a size"),
        ({"from": "a", "to_hf": "b", "max_shard_size": "0GB"}, "max_shard_size=0GB: expected"),
        (
            {"from_hf": "a", "to": "b", "dtype": "bfloat16"},
            "apply to --to_hf: imports are float32",
        ),
        ({"from": "a", "to_hf": "b", "eod_token": "x"}, "--eod_token applies to --from_hf:"),
    ],
    ids=str,
)
def test_flags(values, message):
    with pytest.raises(ValueError, match=message):
        _convert(**values)
