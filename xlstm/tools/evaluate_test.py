"""Tests of evaluate, started as a user starts it."""

import dataclasses
import json
import math
import shutil

import pytest

from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.testing.patience import PATIENCE
from xlstm.tools import evaluate
from xlstm.tools.config import load_config, to_run_config
from xlstm.tools.testing.start_tool import start_tool
from xlstm.trainer.llm.train import train_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of token stores and of a run with a moving average of its parameters."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("store", "wiki", "flipped"):
        write_store(folder / name, [f"{name}{i} = {i}\n" * 40 for i in range(30)])
    text = (folder / "flipped" / "tokens.bin").read_bytes()
    (folder / "flipped" / "tokens.bin").write_bytes(text.replace(b"f", b"g", 1))
    config = to_run_config(load_config("smoke"))
    data = dataclasses.replace(
        config.data,
        stores=(str(folder / "store"),),
        validation_stores=(f"wiki={folder / 'wiki'}",),
        validation_fraction=0.1,
        context_length=16,
    )
    config = dataclasses.replace(
        config,
        data=data,
        optimizer=dataclasses.replace(config.optimizer, ema_decay=0.5),
        trainer=dataclasses.replace(config.trainer, eval_batches=10_000),
        logger=dataclasses.replace(config.logger, sample_tokens=0, tensorboard=False),
    )
    train_language_model(config, str(folder / "run"))
    words = write_tokenizer_json(str(folder / "tokenizer.json"), words=["wiki"])
    write_store(folder / "foreign", ["wiki = 1\n" * 40] * 30, load_tokenizer(words))
    return folder


def _copy_onto_task(folder):
    """Copies the run as one on a task, which has no stores to validate on."""
    shutil.copytree(folder / "run", folder / "task")
    saved = json.loads((folder / "run" / "config.json").read_text())
    saved["config"]["data"] |= {"task": "parity", "validation_stores": []}
    (folder / "task" / "config.json").write_text(json.dumps(saved))


def _start(folder, *flags):
    env = {"BUILD_WORKING_DIRECTORY": str(folder)}
    return start_tool(evaluate, *flags, env=env)


def _logged(folder, step):
    """Returns the run's own evaluation after a step."""
    with open(folder / "run" / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    (row,) = [row for row in rows if row["step"] == step and "val_loss" in row]
    return row


def test_it_finds_what_the_run_found(folder):
    flags = "--checkpoint=run", "--json=found.json", "--simulate_devices=4", "--mesh=fsdp=2,tp=2"
    process = _start(folder, *flags)
    early = _start(folder, "--checkpoint=run/checkpoints/10", "--data=wiki", "--json=early.json")
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "held out" in output and "wiki" in output
    found = json.loads((folder / "found.json").read_text())
    first = f"step 20 of {folder / 'run'}, complete validation sets:"
    assert output.splitlines()[0] == first
    assert f"{found['val_accuracy']:.2%}" in output
    assert found == pytest.approx(_logged(folder, 20), rel=1e-5)
    for suffix in ("", "_wiki"):
        # All text is of one-byte characters; only the markers of documents have no bytes.
        bits = found[f"val_loss{suffix}"] / math.log(2)
        assert bits < found[f"val_bits_per_byte{suffix}"] < 1.01 * bits

    output, errors = early.communicate(timeout=PATIENCE)
    assert early.returncode == 0, errors
    found = json.loads((folder / "early.json").read_text())
    expected = {name: x for name, x in _logged(folder, 10).items() if "wiki" in name}
    assert found == pytest.approx({"step": 10} | expected, rel=1e-5)


def test_whole_documents_in_pieces(folder):
    """Pieces that carry the state have the loss of one row that holds all documents."""
    pieces = _start(
        *(folder, "--checkpoint=run", "--carry_state", "--batch_size=2", "--json=pieces.json"),
        *("--simulate_devices=4", "--mesh=cp=2,tp=2"),
    )
    whole = _start(
        *(folder, "--checkpoint=run", "--batch_size=1", "--context_length=16000"),
        "--json=whole.json",
    )
    output, errors = pieces.communicate(timeout=PATIENCE)
    assert pieces.returncode == 0, errors
    assert "held out: loss by position in the document" in output
    assert whole.wait(timeout=PATIENCE) == 0
    found, expected = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("pieces", "whole")
    )
    positions = {name: found.pop(f"loss_by_position{name}") for name in ("", "_wiki")}
    assert found == pytest.approx(expected, rel=1e-5)
    # In its own pieces of 16 tokens, the run has another loss.
    assert abs(found["val_loss"] / _logged(folder, 20)["val_loss"] - 1) > 1e-4
    for name, losses in positions.items():
        assert [(x["first"], x["last"]) for x in losses] == [(1, 255), (256, 511)]
        total = sum(x["count"] * x["loss"] for x in losses)
        assert total / sum(x["count"] for x in losses) == pytest.approx(found[f"val_loss{name}"])


def test_bad_input_is_one_line_and_status_2(folder):
    tokens = next((folder / "run" / "checkpoints" / "10").rglob("d/*"))
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _copy_onto_task(folder)
    cases = {
        "is missing": [],
        "store has no complete checkpoint: expected the folder of a run": ["--checkpoint=store"],
        "7 does not exist: the run has the checkpoints": ["--checkpoint=run/checkpoints/7"],
        "nowhere does not exist: expected the folder of a run": ["--checkpoint=nowhere"],
        "has other bytes than were written": ["--checkpoint=run/checkpoints/10"],
        "no token store at": ["--checkpoint=run", "--data=x=nowhere"],
        "damaged: the SHA-256 of tokens.bin": ["--checkpoint=run", "--data=flipped"],
        "encoded with another tokenizer": ["--checkpoint=run", "--data=foreign"],
        "expected sizes, such as fsdp=4,tp=2": ["--checkpoint=run", "--mesh=8"],
        "is larger than the validation sets": ["--checkpoint=run", "--batch_size=2000000"],
        "but the run is on data.task='parity'": ["--checkpoint=task", "--carry_state"],
        "expected a multiple of 3": ["--checkpoint=run", "--simulate_devices=3", "--mesh=cp=3"],
    }
    texts = list(cases)
    for two in (texts[i : i + 2] for i in range(0, len(texts), 2)):  # Most of it is importing.
        processes = {text: _start(folder, *cases[text]) for text in two}
        for text, process in processes.items():
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 2, errors
            assert errors.startswith("error: ") and errors.count("\n") == 1, errors
            assert text in errors
    tokens.write_bytes(content)


def test_help_lists_the_flags_of_all_modules_and_succeeds(folder):
    process = _start(folder, "--help")
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    for flag in ("checkpoint", "mesh", "data", "simulate_devices", "[no]verify_data"):
        assert f"\n  --{flag}" in output
