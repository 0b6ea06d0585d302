import gzip
import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections.config_flags import tuple_parser

from xlstm.dataset.config import DataConfig
from xlstm.dataset.store_data import open_stores, train_batches
from xlstm.dataset.testing import (
    open_verified,
    tokenizer_families,
    write_store,
    write_tokenizer_json,
)
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.validation import open_validation_sets
from xlstm.testing.patience import wait_until
from xlstm.tools.prepare_data import train_command

COMMAND = [sys.executable, "-m", "xlstm.tools.prepare_data"]


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def prepare(folder, *arguments):
    """Runs the tool as a user in `folder` would."""
    return subprocess.run(
        [*COMMAND, "--workers=1", *arguments],
        env=environment(BUILD_WORKING_DIRECTORY=str(folder)),
        capture_output=True,
        text=True,
    )


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("second book")
    (tmp_path / "books" / "a.txt").write_text("first book")
    (tmp_path / "books" / ".hidden").write_bytes(b"\xff")
    write_lines(tmp_path / "lines.jsonl", [f"line {i} " * 100 for i in range(2000)] + [""])
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    return tmp_path


def test_from_files_to_batches(corpus):
    inputs = ["--input=books,lines.jsonl", "--input=*.gz"]
    result = prepare(corpus, *inputs, "--output=out/one")
    assert result.returncode == 0, result.stderr
    store = open_verified(str(corpus / "out" / "one"))
    documents = bytes(store.tokens[:]).split(b"\0")[1:]
    assert documents[:3] == [b"first book", b"second book", b"line 0 " * 100]
    assert documents[-1] == b"packed"
    assert store.meta.num_documents == 2003
    for words in ("2,003", f"{store.meta.num_tokens:,}", "left out (empty)  1"):
        assert words in result.stdout
    assert f"--config.data.stores={store.path}" in result.stdout

    result = prepare(corpus, *inputs, "--output=out/two", "--workers=3")
    assert result.returncode == 0, result.stderr
    for name in ("tokens.bin", "documents.bin", "meta.json"):
        one, two = corpus / "out" / "one" / name, corpus / "out" / "two" / name
        assert one.read_bytes() == two.read_bytes()

    config = DataConfig(stores=(store.path,))
    stores = open_stores(config, "")
    assert next(train_batches(config, stores)).inputs.shape == (16, 256)
    assert next(open_validation_sets(config, stores)[0].batches()).inputs.shape == (16, 256)


def test_with_a_tokenizer(corpus):
    write_tokenizer_json(corpus / "tokenizer.json", ["<end>"], words=["book"])
    tokenizer = ["--tokenizer=tokenizer.json", "--eod_token=<end>"]
    result = prepare(corpus, "--input=books", "--output=store", *tokenizer)
    assert result.returncode == 0, result.stderr
    store = TokenStore.open(str(corpus / "store"))
    assert store.load_tokenizer().decode(store.tokens[:]) == "first booksecond book"
    assert f"--config.model.vocab_size={store.meta.vocab_size}" in result.stdout


def test_bad_input(corpus):
    (corpus / "bad.jsonl").write_text('{"text": "fine"}\nnonsense\n')
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    cases = {
        ("--input=bad.jsonl",): "bad.jsonl, line 2: not JSON",
        ("--input=latin.txt",): "latin.txt, line 1: not UTF-8 text",
        ("--input=none*.txt",): "none*.txt: no such file",
        ("--input=books", "--tokenizer=none.json"): "none.json': give 'byte' or the path",
        ("--input=books", "more"): "unexpected argument 'more'",
        ("--input=books", "--max_bad_records=0.1"): "--max_bad_records needs --skip_bad_records",
        ("--input=books", "--skip_bad_records", "--max_bad_records=2"): "a share from 0 to 1",
        ("--input=books", "--max_unknown=nan"): "expected a share from 0 to 1",
    }
    for arguments, message in cases.items():
        result = prepare(corpus, *arguments, "--output=out/store")
        assert result.returncode == 2, result.stderr
        assert message in result.stderr and "Traceback" not in result.stderr
        assert not (corpus / "out").exists() or not os.listdir(corpus / "out")


def test_bad_records(corpus):
    lines = ['{"text": "fine"}'] * 1989 + ["nonsense", '{"body": "x"}', '{"text": 5}'] * 4
    (corpus / "bad.jsonl").write_text("\n".join(lines))
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    inputs = ["--input=bad.jsonl,latin.txt,packed.jsonl.gz", "--skip_bad_records"]
    result = prepare(corpus, *inputs, "--output=store", "--workers=2")
    assert result.returncode == 0, result.stderr
    store = open_verified(str(corpus / "store"))
    assert bytes(store.tokens[:]) == b"\0fine" * 1989 + b"\0packed"
    assert "left out (bad)    13" in result.stdout
    reasons = ["not JSON", "no 'text' among its keys", "'text' is not a string, but 5"] * 4
    listed = [line for line in result.stderr.splitlines() if line.startswith("left out")]
    for number, (line, reason) in enumerate(zip(listed[:10], reasons, strict=False), 1990):
        assert line.startswith(f"left out: {corpus}/bad.jsonl, line {number}: {reason}")
    assert listed[10:] == ["left out: 3 more"]

    result = prepare(corpus, *inputs, "--output=none", "--max_bad_records=0.005")
    assert result.returncode == 2
    assert "13 of 2,003 records are bad (0.65%), more than --max_bad_records=0.005" in result.stderr
    assert "latin.txt" not in result.stderr and "line 1990: not JSON" in result.stderr
    assert not (corpus / "none").exists()

    (corpus / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-4])
    torn = ["--input=torn.jsonl.gz", "--skip_bad_records", "--max_bad_records=1"]
    result = prepare(corpus, *torn, "--output=none")
    assert result.returncode == 2
    assert "torn.jsonl.gz is not a complete gzip file: its end is missing" in result.stderr


def test_characters_that_have_no_token(corpus):
    definition = json.loads(tokenizer_families()["suffix_bpe"])
    definition["model"]["unk_token"] = None
    (corpus / "words.json").write_text(json.dumps(definition))
    lines = [{"text": "the cat sat"}] * 40 + [{"text": "the Quote sat"}, {"text": "한 the"}]
    (corpus / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--input=in.jsonl", "--tokenizer=words.json", "--output=store"]
    result = prepare(corpus, *arguments)
    assert result.returncode == 2
    assert "in.jsonl, line 41: no token for 'Q' (U+0051), " in result.stderr
    assert "characters so far" in result.stderr and "--max_unknown=0:" in result.stderr
    assert not (corpus / "store").exists()
    # "Q", "u" and "한" are three of 40 * 11 + 13 + 5 characters.
    result = prepare(corpus, *arguments, "--max_unknown=0.006")
    assert result.returncode == 2
    assert "leaves out 3 of 458 characters (0.66%)" in result.stderr
    result = prepare(corpus, *arguments, "--max_unknown=0.007")
    assert result.returncode == 0, result.stderr
    assert "left out (chars)  3" in result.stdout
    assert "line 42: no token for '한' (U+D55C)" in result.stderr

    (corpus / "nul.jsonl").write_text('{"text": "a\\u0000b"}\n')
    result = prepare(corpus, "--input=nul.jsonl", "--output=none")
    assert result.returncode == 2
    assert "nul.jsonl, line 1: no token for '\\x00' (U+0000)" in result.stderr


def test_unknown_tokens_are_counted_and_markers_are_those_of_the_model(corpus):
    model = corpus / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes(tokenizer_families()["metaspace_unigram"])
    (model / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    write_lines(corpus / "in.jsonl", ["the 한 cat 🌶", "sat"])
    arguments = ["--input=in.jsonl", "--tokenizer=model"]
    result = prepare(corpus, *arguments, "--output=store")
    assert result.returncode == 0, result.stderr
    assert "unknown tokens    2" in result.stdout
    store = TokenStore.open(str(corpus / "store"))
    documents = np.split(store.tokens[:], store.documents[1:-1])
    assert [(int(ids[0]), int(ids[-1])) for ids in documents] == [(1, 2), (1, 2)]
    result = prepare(corpus, *arguments, "--bos_token=<pad>", "--eod_token=<s>", "--output=other")
    assert result.returncode == 0, result.stderr
    other = TokenStore.open(str(corpus / "other"))
    assert (other.tokens[0], other.tokens[-1]) == (3, 1)


def test_odd_paths(corpus):
    folder = corpus / "a,b" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / "new\nline.txt").write_text("odd")
    (folder / "bad.jsonl").write_text("nonsense")
    odd = f"--input={folder}/new\nline.txt"
    result = prepare(corpus, odd, "--input=books/a.txt,packed.jsonl.gz", "--output=store")
    assert result.returncode == 0, result.stderr
    assert bytes(TokenStore.open(str(corpus / "store")).tokens[:]) == b"\0odd\0first book\0packed"
    result = prepare(corpus, "--input=a,b", "--output=none")
    assert result.returncode == 2
    assert "bad.jsonl, line 1: not JSON" in result.stderr and "Traceback" not in result.stderr


def test_an_existing_store_stays(corpus):
    assert prepare(corpus, "--input=books", "--output=store").returncode == 0
    result = prepare(corpus, "--input=lines.jsonl", "--output=store")
    assert result.returncode == 2
    assert "store exists already" in result.stderr
    assert open_verified(str(corpus / "store")).meta.num_documents == 2


def test_killed_half_way(corpus):
    # This tokenizer takes about 10 s for the file, so the tool is killed in the middle.
    write_tokenizer_json(corpus / "tokenizer.json")
    write_lines(corpus / "long.jsonl", ["some words " * 1000] * 2000)
    process = subprocess.Popen(
        [*COMMAND, "--input=long.jsonl", "--output=store", "--tokenizer=tokenizer.json"],
        env=environment(BUILD_WORKING_DIRECTORY=str(corpus)),
        stderr=subprocess.DEVNULL,
    )
    files = "store.incomplete-*/tokens.bin"
    wait_until(lambda: any(file.stat().st_size for file in corpus.glob(files)), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (left,) = corpus.glob("store*")
    with pytest.raises(ValueError, match="not a token store, or was never finished"):
        TokenStore.open(str(left))
    result = prepare(corpus, "--input=books", "--output=store")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 12, 25, 26, 40])
def test_train_command_splits_few_documents(tmp_path, count):
    store = write_store(tmp_path / "store", ["text " * 300] * count)
    command = train_command(store.path, store.meta)
    fraction = command.partition("--config.data.validation_fraction=")[2]
    config = DataConfig(
        stores=(store.path,), **({"validation_fraction": float(fraction)} if fraction else {})
    )
    if count > 1:
        (held_out,) = open_validation_sets(config, [store])
        assert next(held_out.batches()).targets_mask.any()
    next(train_batches(config, [store]))


def test_train_command_quotes_odd_paths(tmp_path):
    store = write_store(tmp_path / "my store, new", ["text"] * 50)
    words = shlex.split(train_command(store.path, store.meta))
    (value,) = [word for word in words if word.startswith("--config.data.stores=")]
    value = value.removeprefix("--config.data.stores=")
    assert tuple_parser.TupleParser().parse(value) == (store.path,)


@pytest.mark.parametrize("name", ["store", "my store, new", "it's $HOME"])
def test_the_printed_command_works_as_it_is_pasted_into_a_shell(corpus, name):
    """A script replaces the `bazelw` of the checkout, and passes its arguments to `train`."""
    bazelw = corpus / "bazelw"
    bazelw.write_text(f'#!/bin/sh\nshift 3\nexec "{sys.executable}" -m xlstm.tools.train "$@"\n')
    bazelw.chmod(0o755)
    result = prepare(corpus, "--input=lines.jsonl", f"--output={name}")
    assert result.returncode == 0, result.stderr
    command = result.stdout.rstrip().splitlines()[-1].strip()
    assert command.startswith("./bazelw run //xlstm/tools:train -- ")
    # The tool stops at the last of its checks, before it trains.
    trained = subprocess.run(
        ["bash", "-c", f"{command} --config.model.vocab_size=100"],
        cwd=corpus,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "only model.vocab_size=100" in trained.stderr, trained.stderr
    assert f"--workdir=runs/{name}" in shlex.split(command)
