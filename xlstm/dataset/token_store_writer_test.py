"""Tests of writing token stores."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from xlstm.dataset.document_block import DocumentBlock
from xlstm.dataset.testing import open_verified, write_store, write_tokenizer_json
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import (
    EncodedDocuments,
    TokenStoreWriter,
    encode_blocks,
    encode_documents,
)
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer
from xlstm.files import FolderExistsError


@dataclasses.dataclass(frozen=True)
class Numbered(DocumentBlock):
    """A block whose document is its number; the first blocks are slow."""

    number: int = 0

    def texts(self, on_bad_record=None):
        time.sleep(0.05 if self.number < 3 else 0)
        yield str(self.number)


@dataclasses.dataclass(frozen=True)
class Malformed(DocumentBlock):
    def texts(self, on_bad_record=None):
        raise ValueError("file.txt, line 7: not text")


@dataclasses.dataclass(frozen=True)
class PartlyMalformed(DocumentBlock):
    def texts(self, on_bad_record):
        yield "before"
        on_bad_record("file.txt, line 7: not text")
        yield "behind"


@pytest.fixture
def words(tmp_path):
    """Returns a tokenizer with a definition."""
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


BYTES = ByteTokenizer()


def run_python(code, *arguments):
    """Runs code in another process with the same modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_empty_texts_are_left_out_and_counted():
    documents = encode_documents(BYTES, ["a", "", "\0", "bc"])
    assert documents.tokens.tolist() == [0, 97, 0, 98, 99]
    assert documents.lengths.tolist() == [2, 3]
    assert documents.text_bytes == 3
    assert documents.num_empty == 2


def test_the_same_text_gives_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_store(one, ["a", "bc", "d"])
    with TokenStoreWriter(str(two), BYTES) as writer:
        for text in ["a", "bc", "d"]:
            writer.add(encode_documents(BYTES, [text]))
    assert sorted(os.listdir(one)) == ["documents.bin", "meta.json", "tokens.bin"]
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_folders_above_are_made(tmp_path):
    write_store(tmp_path / "a" / "b" / "store", ["text"])
    assert os.listdir(tmp_path / "a" / "b") == ["store"]


def test_never_overwrites(tmp_path):
    store = write_store(tmp_path / "store", ["first"])
    with pytest.raises(FolderExistsError, match="store exists already"):
        TokenStoreWriter(store.path, BYTES)
    assert bytes(open_verified(store.path).tokens[:]) == b"\0first"


def test_the_first_to_finish_wins(tmp_path):
    path = str(tmp_path / "store")
    with pytest.raises(FolderExistsError, match="created by another process"):
        with TokenStoreWriter(path, BYTES) as slow:
            slow.add(encode_documents(BYTES, ["slow"]))
            write_store(path, ["quick"])
    assert bytes(open_verified(path).tokens[:]) == b"\0quick"
    assert os.listdir(tmp_path) == ["store"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with TokenStoreWriter(str(tmp_path / "store"), BYTES) as writer:
            writer.add(encode_documents(BYTES, ["text"]))
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_store_without_documents_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the input holds no text"):
        with TokenStoreWriter(str(tmp_path / "store"), BYTES) as writer:
            writer.add(encode_documents(BYTES, [""]))
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_store(tmp_path):
    code = """
        import os, signal, sys
        from xlstm.dataset.token_store_writer import TokenStoreWriter, encode_documents
        from xlstm.dataset.tokenizer import ByteTokenizer
        tokenizer = ByteTokenizer()
        with TokenStoreWriter(sys.argv[1], tokenizer) as writer:
            writer.add(encode_documents(tokenizer, ["x" * 3_000_000]))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = run_python(code, tmp_path / "store")
    assert result.returncode == -9, result.stderr
    (left,) = os.listdir(tmp_path)
    assert left.startswith("store.incomplete-")
    for name in (left, "store"):
        with pytest.raises(ValueError, match="not a token store|no token store at"):
            TokenStore.open(str(tmp_path / name))
    write_store(tmp_path / "store", ["and again"])


def test_a_full_disk_leaves_no_store(tmp_path):
    # Writing beyond a size limit fails in the same calls as a full disk.
    code = """
        import resource, sys
        from xlstm.dataset.testing import write_store
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_store(sys.argv[1], ["x" * int(sys.argv[2])])
        except OSError as error:
            print(error)
            sys.exit(2)
    """
    for size in (150_000, 3_000_000):  # Fails in the last flush, and in the first write.
        result = run_python(code, tmp_path / "store", size)
        assert result.returncode == 2, result.stderr
        assert "File too large" in result.stdout and "tokens.bin" in result.stdout
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tokens, lengths",
    [
        ([97, 98], [2]),  # No marker.
        ([0, 97, 0, 98], [4]),  # A marker inside.
        ([0, 97, 0, 98], [1, 3]),  # A marker elsewhere.
    ],
)
def test_documents_of_another_shape(tmp_path, tokens, lengths):
    documents = EncodedDocuments(np.array(tokens, np.uint8), np.array(lengths), 1, 0)
    with pytest.raises(ValueError, match="were not encoded with this store's tokenizer byte"):
        with TokenStoreWriter(str(tmp_path / "store"), BYTES) as writer:
            writer.add(documents)


def test_documents_of_another_tokenizer(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    with TokenStoreWriter(str(tmp_path / "store"), tokenizer) as writer:
        writer.add(encode_documents(tokenizer, ["right"]))
        with pytest.raises(ValueError, match="were not encoded with this store's tokenizer"):
            writer.add(encode_documents(BYTES, ["wrong"]))
        too_large = np.array([0, tokenizer.vocab_size], np.uint16)
        with pytest.raises(ValueError, match=f"below the vocabulary size {tokenizer.vocab_size}"):
            writer.add(EncodedDocuments(too_large, np.array([2]), 1, 0))
