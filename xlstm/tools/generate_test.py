"""Tests of the tool `generate`, started as a user starts it."""

import dataclasses
import json
import sys

import pytest

from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.testing.patience import PATIENCE
from xlstm.tools import generate
from xlstm.tools.config import load_config, to_run_config
from xlstm.tools.testing.start_tool import start_tool
from xlstm.trainer.llm.train import open_training

WORDS = ["one", " two", " three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run that has its own tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = load_tokenizer(write_tokenizer_json(str(folder / "words.json"), words=WORDS))
    write_store(folder / "store", ["one two three " * 20] * 30, tokenizer)
    config = to_run_config(load_config("smoke"))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=288),
        data=dataclasses.replace(config.data, stores=(str(folder / "store"),), context_length=16),
    )
    with open_training(config, str(folder / "run")) as run:
        run.checkpointer.save(1, run.state)
    (folder / "words.json").unlink()  # The run has its own.
    return folder


def _start(folder, *flags, **options):
    env = {"BUILD_WORKING_DIRECTORY": str(folder)}
    return start_tool(generate, "--checkpoint=run", *flags, env=env, **options)


def _finish(process, status=0):
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, errors
    return output if status == 0 else errors


def test_a_batch_of_texts_and_each_alone_on_a_mesh(folder):
    (folder / "prompts").write_bytes(b"\xef\xbb\xbfone two\r\none\r\n")  # As Windows writes it.
    common = "--num_tokens=9", "--top_k=20", "--seed=5"
    batch = _start(folder, "--prompt= three", "--prompt_file=prompts", "--json=a.json", *common)
    mesh = "--mesh=fsdp=2,tp=2", "--simulate_devices=4"
    alone = _start(folder, "--prompt= three", "--output_ids", *mesh, *common)
    output = _finish(batch)
    found = json.loads((folder / "a.json").read_text())
    assert [text["prompt"] for text in found] == [" three", "one two", "one"]
    for number, text in enumerate(found, 1):
        assert len(text["ids"]) <= 9 and text["reason"] in ("length", "end")
        assert f" {number} of 3 ─" in output and text["prompt"] + text["text"] in output
    assert [int(word) for word in _finish(alone).split()] == found[0]["ids"]


def test_a_text_goes_on_from_a_saved_state(folder):
    greedy = "--temperature=0", "--prompt_ids=0,257", "--output_ids"
    whole = _start(folder, *greedy, "--num_tokens=8")
    first = _finish(_start(folder, *greedy, "--num_tokens=3", "--save_state=s"))
    flags = "--load_state=s", "--temperature=0", "--num_tokens=5", "--output_ids"
    then = _finish(_start(folder, *flags))
    assert f"{first.strip()} {then}" == _finish(whole)


@pytest.mark.parametrize(
    "content, prompts",
    [
        (b"the cat\nthe dog\n", ["the cat", "the dog"]),
        (b"the cat\r\nthe dog\r\n", ["the cat", "the dog"]),
        (b"the cat\rthe dog\r", ["the cat", "the dog"]),
        (b"the cat\r\nthe dog", ["the cat", "the dog"]),
        (b"\xef\xbb\xbfthe cat\n", ["the cat"]),
        (b"\xef\xbb\xbf\r\nthe cat", ["", "the cat"]),
        ("é \ufeff\u2028\n".encode(), ["é \ufeff\u2028"]),  # They stay inside a prompt.
        (b" the cat \n\n\n", [" the cat ", "", ""]),
        (b"\n", [""]),
        (b"\r\n", [""]),
    ],
)
def test_a_prompt_is_a_line(content, prompts):
    assert generate.split_prompts(content, "file") == prompts


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "^file is empty: expected one prompt per line$"),
        (b"\xef\xbb\xbf", "^file is empty: expected one prompt per line$"),
        (b"caf\xe9\n", "^file is not UTF-8: .* byte 0xe9 in position 3"),
        *(
            (
                "the cat\n".encode(name),
                "^file looks like UTF-16: expected UTF-8, one prompt per line$",
            )
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
        ),
    ],
)
def test_files_that_hold_no_prompts(content, message):
    with pytest.raises(OSError, match=message):
        generate.split_prompts(content, "file")


@pytest.mark.parametrize(
    "message, flags",
    [
        ("--prompt_ids=a: expected token ids", ["--prompt_ids=a"]),
        ("--prompt_ids cannot be combined with --prompt", ["--prompt_ids=1", "--prompt=x"]),
        ("--prompt_file=/dev/null is empty", ["--prompt_file=/dev/null"]),
        ("temperature=nan: it must be a finite number", ["--temperature=nan"]),
        ("run/config.json is not a saved state", ["--load_state=run/config.json"]),
        ("does not divide over mesh.tp=3", ["--mesh=tp=3", "--simulate_devices=3"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder, message, flags):
    errors = _finish(_start(folder, *flags), status=2)
    assert message in errors and len(errors.splitlines()) == 1


def test_a_terminal_obeys_no_text(monkeypatch, capsys):
    text = "\x1b[2J\tred\n\u202eabc\r"
    assert generate._printable(text) == text  # Files and pipes get the text unchanged.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate._printable(text) == "\\x1b[2J\tred\n\\u202eabc\\x0d"
