import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from xlstm.dataset.testing import write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return write_tokenizer_json(path, words=["hello", "world"])


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_json_round_trip(json_path, text):
    tokenizer = load_tokenizer(json_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Exact wherever it is cut, be it within a character.
    half = ids.size // 2
    counts = [tokenizer.count_bytes(part) for part in (ids, ids[:half], ids[half:])]
    assert counts[0] == counts[1] + counts[2] == len(text.encode())


def test_bytes_of_markers_and_added_tokens(json_path, tmp_path):
    definition = json.loads(open(json_path).read())
    shape = {**definition["added_tokens"][0], "special": False}
    definition["added_tokens"].append({**shape, "id": 1000, "content": " é"})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    for tokenizer in (load_tokenizer("byte"), load_tokenizer(json_path), load_tokenizer(str(path))):
        ids = tokenizer.encode("hello é")
        with_markers = np.concatenate([[tokenizer.eod_id], ids, [tokenizer.eod_id]])
        assert tokenizer.count_bytes(with_markers) == 8
        assert tokenizer.count_bytes(with_markers[:1]) == tokenizer.count_bytes(ids[:0]) == 0


def test_bytes_of_other_special_tokens(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["<|endoftext|>", "<pad>"])
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([1, 0]) == "" and tokenizer.count_bytes(np.array([1, 0])) == 0


def test_bytes_of_a_vocabulary_of_words(tmp_path):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "wörld": 1, "hello": 2}, unk_token="</s>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([0, 2, 1]) == "hello wörld"
    assert tokenizer.count_bytes(np.array([0, 2, 1])) == len("hello wörld".encode())


def test_byte_tokenizer_leaves_nul_out():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.encode("a\0b").tolist() == [97, 98]
    assert tokenizer.decode([0, 97, 0, 98]) == "ab"


def test_byte_tokenizer_replaces_what_is_not_utf8():
    assert ByteTokenizer().decode([97, 0xE9, 98]) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["byte", "json"])
def test_lone_surrogate(kind, json_path):
    tokenizer = load_tokenizer("byte" if kind == "byte" else json_path)
    with pytest.raises(ValueError, match="U\\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


def test_json_tokenizer(json_path):
    tokenizer = load_tokenizer(json_path)
    assert (tokenizer.eod_id, tokenizer.eod_token) == (0, "<|endoftext|>")
    assert tokenizer.encode("hello").size == 1
    assert tokenizer.encode("hello").dtype == np.uint16
    assert tokenizer.vocab_size == 1 + max(tokenizer.encode("hello world").max(), 256)


def test_marker_in_a_text_is_text(json_path):
    tokenizer = load_tokenizer(json_path)
    text = "before<|endoftext|>after"
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_marker_that_is_not_special_is_left_out(json_path, tmp_path):
    definition = json.loads(open(json_path).read())
    definition["added_tokens"][0]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("before<|endoftext|>after")
    assert tokenizer.decode(ids) == "beforeafter"
    with_markers = np.concatenate([[tokenizer.eod_id], ids, [tokenizer.eod_id]])
    assert tokenizer.decode(with_markers) == "beforeafter"
    assert tokenizer.count_bytes(with_markers) == len("beforeafter")


def test_truncation_and_padding_of_the_file_are_off(json_path, tmp_path):
    definition = json.loads(open(json_path).read())
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    assert load_tokenizer(str(path)).encode("x" * 100).size == 100


def test_eod_by_name(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["<pad>", "<end>"])
    assert load_tokenizer(path, "<end>").eod_id == 1
    with pytest.raises(ValueError, match="no end-of-document token .*'</s>'"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="looked for '<stop>'"):
        load_tokenizer(path, "<stop>")
    with pytest.raises(ValueError, match="NUL"):
        load_tokenizer("byte", "<end>")


def test_eod_as_a_public_model_names_it(tmp_path):
    path = write_tokenizer_json(str(tmp_path / "tokenizer.json"), ["<s>", "</s>", "<end>"])
    config = tmp_path / "tokenizer_config.json"
    for eos_token in ("<end>", {"content": "<end>", "special": True}):
        config.write_text(json.dumps({"eos_token": eos_token}))
        assert load_tokenizer(path).eod_id == 2
        assert load_tokenizer(path, "<s>").eod_id == 0
    config.write_text(json.dumps({"eos_token": None}))
    assert load_tokenizer(path).eod_token == "</s>"
    config.write_text('{"eos_token": 5}')
    with pytest.raises(ValueError, match="eos_token=5: expected a text"):
        load_tokenizer(path)
    config.write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be used"):
        load_tokenizer(path)


def test_folder_stands_for_its_file(json_path, tmp_path):
    write_tokenizer_json(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.json")


def test_fingerprint(json_path, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(open(json_path, "rb").read())
    other = write_tokenizer_json(tmp_path / "other.json", words=["different"])
    fingerprint = load_tokenizer(json_path).fingerprint
    assert load_tokenizer(str(copy)).fingerprint == fingerprint
    assert load_tokenizer(other).fingerprint != fingerprint
    assert load_tokenizer("byte").fingerprint != fingerprint


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer 'bytes'.*'byte'"):
        load_tokenizer("bytes")
    with pytest.raises(ValueError, match="no tokenizer .*tokenizer.json"):
        load_tokenizer(str(tmp_path))
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match="bad.json is not a tokenizer.json"):
        load_tokenizer(str(bad))
    bad.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="bad.json is not a tokenizer.json"):
        load_tokenizer(str(bad))
