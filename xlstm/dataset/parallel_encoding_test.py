import dataclasses
import time

import numpy as np
import pytest

from xlstm.dataset.document_readers import Block
from xlstm.dataset.parallel_encoding import encode_blocks
from xlstm.dataset.testing import write_tokenizer_json
from xlstm.dataset.token_store_writer import encode_documents
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Numbered(Block):
    """A block whose document is its number; the first ones take longest."""

    number: int = 0

    def texts(self, on_bad=None):
        time.sleep(0.05 if self.number < 3 else 0)
        yield str(self.number)


@dataclasses.dataclass(frozen=True)
class Malformed(Block):
    def texts(self, on_bad=None):
        raise ValueError("file.txt, line 7: not text")


@dataclasses.dataclass(frozen=True)
class PartlyMalformed(Block):
    def texts(self, on_bad):
        yield "before"
        on_bad("file.txt, line 7: not text")
        yield "behind"


@pytest.fixture
def words(tmp_path):
    """A tokenizer that is a file."""
    return load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json", ["<a>", "</s>"]))


@pytest.mark.parametrize("kind", ["byte", "words"])
@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_few_blocks_ahead(words, kind, workers):
    taken, tokenizer = [], ByteTokenizer() if kind == "byte" else words

    def blocks():
        for number in range(40):
            taken.append(number)
            yield Numbered(1, number)

    for number, (block, documents) in enumerate(encode_blocks(blocks(), tokenizer, workers)):
        assert block.number == number
        assert documents.tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(documents.tokens) == str(number)
        assert len(taken) <= number + 1 + 8 + 1
    assert number == 39


def test_the_tokenizer_is_used_as_given(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["<a>", "</s>"], words=["12"])
    tokenizer = load_tokenizer(path, "<a>")
    ((_, documents),) = encode_blocks([Numbered(1, 12)], tokenizer, 1)
    expected = encode_documents(tokenizer, ["12"])
    np.testing.assert_array_equal(documents.tokens, expected.tokens)
    assert documents.tokens[0] == 0 and documents.tokens.dtype == np.uint16


@pytest.mark.parametrize("kind", ["byte", "words"])
def test_a_malformed_document(words, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else words
    with pytest.raises(ValueError, match="^file.txt, line 7: not text$"):
        list(encode_blocks([Numbered(1, 0), Malformed(1), Numbered(1, 1)], tokenizer, 2))


@pytest.mark.parametrize("kind", ["byte", "words"])
def test_malformed_records_that_are_left_out(words, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else words
    blocks = [PartlyMalformed(1), PartlyMalformed(1)]
    for _, documents in encode_blocks(blocks, tokenizer, 2, skip_bad_records=True):
        assert tokenizer.decode(documents.tokens) == "beforebehind"
        assert documents.bad_records == ("file.txt, line 7: not text",)
