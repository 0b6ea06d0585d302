import os

import numpy as np
import pytest
import tokenizers

from xlstm.dataset.testing import write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.huggingface.tokenizer import find_tokenizer, write_byte_tokenizer_files
from xlstm.trainer.llm.run_tokenizer import TOKENIZER_FILES, copy_files


def test_bytes_as_hugging_face_models_have_them(tmp_path):
    write_byte_tokenizer_files(str(tmp_path))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    characters = [*range(1, 0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 991)]
    text = "it's  two\r\n\t" + "".join(map(chr, characters))
    ids = tokenizer.encode(text).ids
    np.testing.assert_array_equal(ids, ByteTokenizer().encode(text))
    assert tokenizer.decode(ids) == text
    # The end-of-document token decodes to nothing.
    assert tokenizer.encode("a\0b").ids == [97, 0, 98]
    assert tokenizer.decode([97, 0, 98]) == "ab"
    assert tokenizer.get_vocab_size() == 256


def test_bytes_are_known_again(tmp_path):
    write_byte_tokenizer_files(str(tmp_path))
    assert isinstance(find_tokenizer(str(tmp_path)), ByteTokenizer)


def test_a_tokenizer_is_found_and_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    assert find_tokenizer(str(source)) is None
    write_tokenizer_json(str(source / "tokenizer.json"), words=["one"])
    (source / "tokenizer_config.json").write_text('{"eos_token": "one"}')
    for name in ("special_tokens_map.json", "chat_template.jinja", "weights.bin"):
        (source / name).write_text("{}")
    assert find_tokenizer(str(source)).eod_token == "one"
    copy_files(str(source), str(target), TOKENIZER_FILES)
    assert set(os.listdir(target)) == set(os.listdir(source)) - {"weights.bin"}
    for name in os.listdir(target):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    found = find_tokenizer(str(target))
    assert found.fingerprint == find_tokenizer(str(source)).fingerprint


def test_a_tokenizer_that_cannot_be_used(tmp_path):
    write_tokenizer_json(str(tmp_path / "tokenizer.json"), special_tokens=())
    with pytest.raises(ValueError, match="has no end-of-document token"):
        find_tokenizer(str(tmp_path))
