import json
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from xlstm.dataset.base_tokenizer import read_definition
from xlstm.dataset.json_tokenizer import parse_tokenizer
from xlstm.dataset.testing import tokenizer_families, write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer, find_markers, load_tokenizer


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
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_of_words(tmp_path):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "wörld": 1, "hello": 2}, unk_token="</s>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([0, 2, 1]) == "hello wörld"
    # The marker is the unknown token, which no text may encode to.
    with pytest.raises(ValueError, match="no token for 'o'"):
        tokenizer.encode("hello other")


def test_byte_tokenizer_has_no_token_for_nul():
    tokenizer = load_tokenizer("byte")
    with pytest.raises(ValueError, match=r"tokenizer byte has no token for '\\x00' \(U\+0000\)"):
        tokenizer.encode("a\0b")
    encoded = tokenizer.encode_batch(["a\0b\0\0", "\0", "c"])
    assert encoded.ids.tolist() == [97, 98, 99]
    assert encoded.dropped == {0: "\0\0\0", 1: "\0"}
    assert encoded.text_bytes.tolist() == [5, 1, 1]
    assert (encoded.corrected.tolist(), encoded.corrected_bytes.tolist()) == ([0], [4])
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
    with pytest.raises(ValueError, match="eos_token=5: expected a string"):
        load_tokenizer(path)
    config.write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be read"):
        load_tokenizer(path)


def write_family(folder, name="byte_fallback_bpe", change=lambda definition: None, **files):
    """Writes a tokenizer with `<s>` (id 1), `</s>` (2) and `<pad>` (3), and files next to it."""
    definition = json.loads(tokenizer_families()[name])
    change(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for file in ("tokenizer_config", "special_tokens_map", "generation_config", "config"):
        (folder / f"{file}.json").unlink(missing_ok=True)
        if file in files:
            (folder / f"{file}.json").write_text(json.dumps(files[file]))
    return str(folder)


def test_the_end_marker_is_what_the_first_file_names_that_names_one(tmp_path):
    sources = {
        "tokenizer_config": {"eos_token": "<s>"},
        "special_tokens_map": {"eos_token": {"content": "</s>"}},
        "generation_config": {"eos_token_id": [3, 1]},
        "config": {"eos_token_id": 1},
    }
    for expected in ("<s>", "</s>", "<pad>", "<s>", "</s>"):
        assert load_tokenizer(write_family(tmp_path, **sources)).eod_token == expected
        if sources:
            del sources[next(iter(sources))]


def test_files_that_disagree_about_the_end_marker_are_told(tmp_path):
    def disagreements(**files):
        path = os.path.join(write_family(tmp_path, **files), "tokenizer.json")
        return find_markers(path, parse_tokenizer(read_definition(path), path)).disagreements

    config = {"eos_token": "</s>"}
    assert not disagreements(tokenizer_config=config, generation_config={"eos_token_id": [2, 3]})
    assert not disagreements(tokenizer_config=config, config={"eos_token_id": 99999})
    assert not disagreements(tokenizer_config=config, config={"eos_token_id": 2**40})
    assert disagreements(
        tokenizer_config=config,
        special_tokens_map={"eos_token": "<s>"},
        generation_config={"eos_token_id": [1, 3]},
    ) == (
        "the token at the end of a text is '</s>', as tokenizer_config.json says; but"
        " special_tokens_map.json says '<s>', generation_config.json says '<s>' or '<pad>'",
    )


def template(single):
    special = [("<s>", 1), ("<pad>", 3)]
    processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    return json.loads(processor.__getstate__())


@pytest.mark.parametrize(
    "processor, files, expected",
    [
        (None, {}, "</s>"),
        (None, {"config": {"bos_token_id": 1}}, "<s>"),
        (None, {"generation_config": {"bos_token_id": 3}, "config": {"bos_token_id": 1}}, "<pad>"),
        (None, {"config": {"bos_token_id": None}}, "</s>"),
        (template("<s> $A"), {"config": {"bos_token_id": 3}}, "<s>"),
        (template("$A <pad>"), {}, "</s>"),
        ({"type": "Sequence", "processors": [template("<pad> $A")]}, {}, "<pad>"),
        (
            {"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]},
            {},
            "<s>",
        ),
    ],
)
def test_the_marker_in_front_is_that_of_the_post_processor_or_of_the_ids(
    tmp_path, processor, files, expected
):
    def change(definition):
        definition["post_processor"] = processor

    tokenizer = load_tokenizer(write_family(tmp_path, change=change, **files))
    assert (tokenizer.bos_token, tokenizer.eod_token) == (expected, "</s>")
    assert load_tokenizer(tokenizer.name, None, "<unk>").bos_token == "<unk>"
    with pytest.raises(ValueError, match="no beginning-of-document token .*'<none>'"):
        load_tokenizer(tokenizer.name, None, "<none>")


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


def test_an_id_far_beyond_the_others_is_refused_at_once(tmp_path):
    path = write_tokenizer_json(str(tmp_path / "tokenizer.json"))
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"]["far\x1b"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"'far\\x1b' has the id 4,294,967,295: expected ids"):
        load_tokenizer(path)
