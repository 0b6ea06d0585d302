import pytest

from xlstm.dataset.testing import write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer
from xlstm.trainer.llm.run_tokenizer import read_tokenizer, write_tokenizer
from xlstm.trainer.llm.workdir import Workdir


def test_a_tokenizer_is_found_again_with_its_marker(tmp_path):
    source = write_tokenizer_json(str(tmp_path / "source.json"), words=["one", "two"])
    for eod_token in (None, "two"):
        tokenizer = load_tokenizer(source, eod_token)
        write_tokenizer(Workdir(str(tmp_path)), tokenizer)
        found = read_tokenizer(Workdir(str(tmp_path)), tokenizer.fingerprint)
        assert found.fingerprint == tokenizer.fingerprint
        assert found.eod_token == tokenizer.eod_token


def test_bytes_need_no_file(tmp_path):
    write_tokenizer(Workdir(str(tmp_path)), ByteTokenizer())
    assert not list(tmp_path.iterdir())
    assert isinstance(read_tokenizer(Workdir(str(tmp_path)), "byte"), ByteTokenizer)


def test_no_tokenizer_or_another_one(tmp_path):
    assert read_tokenizer(Workdir(str(tmp_path)), None) is None
    with pytest.raises(ValueError, match="no tokenizer"):
        read_tokenizer(Workdir(str(tmp_path)), "sha256:0")
    write_tokenizer_json(str(tmp_path / "tokenizer.json"), words=["one"])
    with pytest.raises(ValueError, match="not the tokenizer of the run.*not sha256:0"):
        read_tokenizer(Workdir(str(tmp_path)), "sha256:0")
