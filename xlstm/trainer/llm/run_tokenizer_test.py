import os

import pytest
import tokenizers

from xlstm.dataset.testing import tokenizer_families, write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer, same_tokenizer
from xlstm.trainer.llm.run_tokenizer import (
    check_tokenizer,
    choose_tokenizer,
    read_eos_ids,
    read_tokenizer,
    tokenizer_config,
    write_tokenizer,
)
from xlstm.trainer.llm.workdir import Workdir


def info_of(tokenizer):
    """Returns the part of a checkpoint's `run_info` that is about tokenizers."""
    return {"tokenizer": tokenizer and tokenizer.fingerprint}


def test_a_tokenizer_is_found_again_with_its_markers(tmp_path):
    source = write_tokenizer_json(str(tmp_path / "source.json"), words=["one", "two"])
    for markers in ((None, None), ("two", None), ("two", "one")):
        tokenizer, workdir = load_tokenizer(source, *markers), Workdir(str(tmp_path))
        write_tokenizer(workdir, tokenizer, None)
        for found in (read_tokenizer(workdir, info_of(tokenizer)), load_tokenizer(workdir.path)):
            assert found.fingerprint == tokenizer.fingerprint
            assert (found.eod_id, found.bos_id) == (tokenizer.eod_id, tokenizer.bos_id)


def test_bytes_need_no_file(tmp_path):
    workdir = Workdir(str(tmp_path))
    write_tokenizer(workdir, ByteTokenizer(), None)
    assert not list(tmp_path.iterdir())
    assert isinstance(read_tokenizer(workdir, {"tokenizer": "byte"}), ByteTokenizer)


def test_no_tokenizer_or_another_one(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert read_tokenizer(workdir, {"tokenizer": None}) is None
    with pytest.raises(ValueError, match="no tokenizer"):
        read_tokenizer(workdir, {"tokenizer": "sha256:0"})
    write_tokenizer_json(str(tmp_path / "tokenizer.json"), words=["one"])
    with pytest.raises(ValueError, match="not the tokenizer of the run.*not sha256:0"):
        read_tokenizer(workdir, {"tokenizer": "sha256:0"})


def write_llama(folder):
    """Writes a tokenizer that starts texts with `<s>`."""
    inner = tokenizers.Tokenizer.from_str(tokenizer_families()["byte_fallback_bpe"].decode())
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_a_run_made_when_there_was_one_marker_keeps_it(tmp_path):
    tokenizer = write_llama(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eod_token) == ("<s>", "</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = read_tokenizer(Workdir(str(tmp_path)), info_of(tokenizer))
    assert (found.bos_token, found.eod_token) == ("</s>", "</s>")
    with pytest.raises(ValueError, match=r"'<s> \.\.\. </s>'.* --bos_token='</s>'$"):
        check_tokenizer(Workdir(str(tmp_path)), info_of(tokenizer), tokenizer)


def test_a_file_saved_again_is_the_same_tokenizer(tmp_path):
    words = load_tokenizer(write_tokenizer_json(str(tmp_path / "one.json"), words=["one"]))
    again = tmp_path / "again.json"
    again.write_text(open(words.name).read().replace("\n", "\n\n"))
    again = load_tokenizer(str(again))
    workdir = Workdir(str(tmp_path / "run"))
    os.mkdir(workdir.path)
    assert choose_tokenizer(workdir, words) is words
    write_tokenizer(workdir, words, None)
    # The run keeps its file, whose fingerprint its checkpoints have.
    chosen = choose_tokenizer(workdir, again)
    assert chosen.fingerprint == words.fingerprint != again.fingerprint
    write_tokenizer(workdir, chosen, None)
    assert same_tokenizer(read_tokenizer(workdir, info_of(words)), again)
    check_tokenizer(workdir, info_of(words), again)
    other = load_tokenizer(write_tokenizer_json(str(tmp_path / "two.json"), words=["two"]))
    assert choose_tokenizer(workdir, other) is other
    with pytest.raises(ValueError, match="encoded with another tokenizer .*--tokenizer=.*run"):
        check_tokenizer(workdir, info_of(words), other)


def test_the_files_of_a_model_come_along(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target, source / "additional_chat_templates"):
        folder.mkdir()
    tokenizer = load_tokenizer(write_tokenizer_json(str(source / "tokenizer.json"), words=["one"]))
    contents = {
        "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "chat_template": "{{ x }}"}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.6}',
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    for name, content in contents.items():
        (source / name).write_text(content)
    (source / "weights.bin").write_text("no")
    write_tokenizer(Workdir(str(target)), tokenizer, Workdir(str(source)))
    for name, content in contents.items():
        assert (target / name).read_text() == content
    assert (target / "tokenizer.json").read_bytes() == tokenizer.definition
    assert not (target / "weights.bin").exists()
    assert tokenizer_config(tokenizer) != contents["tokenizer_config.json"]


def test_ids_that_end_texts(tmp_path):
    workdir, file = Workdir(str(tmp_path)), tmp_path / "generation_config.json"
    assert read_eos_ids(workdir, 10) == ()
    for content, expected in [("2", (2,)), ("[3, 2]", (2, 3)), ("null", ()), ("[2, 10]", (2,))]:
        file.write_text('{"eos_token_id": ' + content + "}")
        assert read_eos_ids(workdir, 10) == expected
    file.write_text('{"eos_token_id": "end"}')
    with pytest.raises(ValueError, match=r"eos_token_id=\['end'\]: expected ids"):
        read_eos_ids(workdir, 10)
    file.write_text("[")
    with pytest.raises(ValueError, match="generation_config.json cannot be read"):
        read_eos_ids(workdir, 10)
