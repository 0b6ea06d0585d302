import json

import pytest

from xlstm.dataset.store_meta import StoreMeta
from xlstm.dataset.testing import write_store

FILE = {"bytes": 3, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Returns the fields of a valid `meta.json`."""
    path = tmp_path_factory.mktemp("meta") / "store"
    write_store(path, ["hello", "world"])
    return json.loads((path / "meta.json").read_text())


def test_it_says_what_was_written(fields):
    meta = StoreMeta.from_json(json.dumps(fields))
    assert (meta.tokenizer, meta.dtype, meta.num_documents, meta.num_tokens) == (
        "byte",
        "|u1",
        2,
        12,
    )
    assert json.loads(meta.to_json()) == fields


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"version": True}, "format version True"),
        ({"version": 2.0}, "format version 2.0"),
        ({"version": [2]}, r"format version \[2\]"),
        ({"format": "other"}, "does not describe an xlstm token store"),
        ({"color": "green"}, "fields are not those of version 2: 'color' is unknown"),
        ({"dtype": "<i2"}, "dtype is '<i2': expected one of '|u1', '<u2', '<u4'"),
        ({"dtype": "|b1"}, "dtype is '|b1'"),
        ({"dtype": ">u2"}, "dtype is '>u2'"),
        ({"dtype": "uint8"}, "dtype is 'uint8'"),
        ({"dtype": "<f4"}, "dtype is '<f4'"),
        ({"dtype": "<u8"}, "dtype is '<u8'"),
        ({"dtype": "(2,)u1"}, "dtype is "),
        ({"dtype": 1}, "dtype is 1: expected a string"),
        ({"tokenizer": "../tokenizer.json"}, "tokenizer is '../tokenizer.json': expected 'byte'"),
        ({"tokenizer": "/etc/passwd"}, "tokenizer is '/etc/passwd'"),
        ({"vocab_size": 257}, "vocab_size is 257: expected at least 1 and at most 256"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 256.0}, "vocab_size is 256.0: expected an integer"),
        ({"vocab_size": True}, "vocab_size is True: expected an integer"),
        ({"eod_id": -1}, "eod_id is -1: expected at least 0 and at most 255"),
        ({"bos_id": 256}, "bos_id is 256"),
        ({"bos_id": None}, "bos_id is None"),
        ({"num_documents": -2}, "num_documents is -2"),
        ({"num_documents": 0}, "num_documents is 0"),
        ({"num_documents": 12}, "num_tokens is 12: expected at least 13"),
        ({"num_tokens": 10**4000}, "num_tokens is 10*...0*: expected"),
        ({"text_bytes": -1}, "text_bytes is -1"),
        ({"text_bytes": 2**70}, "text_bytes is"),
        ({"files": []}, "files lack one of documents.bin, tokens.bin"),
        ({"tokenizer": "tokenizer.json"}, "files lack one of documents.bin, tokenizer.json"),
        ({"eod_token": 7}, "eod_token is 7: expected a string"),
    ],
)
def test_fields_that_cannot_be(fields, changes, problem):
    with pytest.raises(ValueError, match=problem) as error:
        StoreMeta.from_json(json.dumps(fields | changes))
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name, entry, problem",
    [
        ("../secret", FILE, "files have '../secret', which is not part of the format"),
        ("/etc/passwd", FILE, "files have '/etc/passwd'"),
        ("\x1b[31m", FILE, r"files have '\\x1b\[31m'"),
        ("tokenizer.json", FILE, "files have 'tokenizer.json'"),  # The tokenizer is "byte".
        ("text_bytes.bin", FILE, "text_bytes.bin ends with an incomplete entry"),
        ("tokens.bin", {"bytes": -12, "sha256": "0" * 64}, "entry of tokens.bin has -12 bytes"),
        ("tokens.bin", {"bytes": 12.0, "sha256": "0" * 64}, "entry of tokens.bin has 12.0 bytes"),
        ("tokens.bin", {"bytes": 13, "sha256": "0" * 64}, "counts and file sizes contradict"),
        ("tokens.bin", {"bytes": 12, "sha256": "0" * 63}, "entry of tokens.bin has the SHA-256 "),
        ("tokens.bin", {"bytes": 12, "sha256": None}, "entry of tokens.bin has the SHA-256 None"),
        ("tokens.bin", {"bytes": 12}, "entry of tokens.bin is not the file's bytes and sha256"),
        ("tokens.bin", 12, "entry of tokens.bin is not"),
    ],
)
def test_entries_of_files_that_cannot_be(fields, name, entry, problem):
    files = fields["files"] | {name: entry}
    with pytest.raises(ValueError, match=problem):
        StoreMeta.from_json(json.dumps(fields | {"files": files}))


def test_every_field_is_needed(fields):
    for name in fields.keys() - {"format", "version"}:
        left = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ValueError, match=f"not those of version 2: '{name}' is missing"):
            StoreMeta.from_json(json.dumps(left))


def test_json_that_has_two_meanings_or_none(fields):
    text = json.dumps(fields)
    twice = text.replace('"num_tokens": 12', '"num_tokens": 12, "num_tokens": 13')
    for bad, problem in [
        (twice, "the field 'num_tokens' occurs twice"),
        (text.replace("12", "NaN", 1), "holds NaN, which is not JSON"),
        (text.replace("12", "-Infinity", 1), "holds -Infinity"),
        (text.replace("12", "1" * 5000, 1), "Exceeds the limit"),
        (text.replace("12", "1e2", 1), "100.0: expected an integer"),
        ("[" * 10**6, "nested too deeply"),
    ]:
        assert bad != text
        with pytest.raises(ValueError, match=problem):
            StoreMeta.from_json(bad)
