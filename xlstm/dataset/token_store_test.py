import json
import os
import shutil

import numpy as np
import pytest

from xlstm.dataset import token_store
from xlstm.dataset.testing import open_verified, write_store, write_tokenizer_json
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import load_tokenizer

TEXTS = ["hello", "wörld", "x" * 1000]


@pytest.fixture
def path(tmp_path):
    write_store(tmp_path / "store", TEXTS)
    return str(tmp_path / "store")


def edit_meta(path, **changes):
    file = os.path.join(path, "meta.json")
    with open(file) as source:
        fields = json.load(source)
    fields.update(changes)
    with open(file, "w") as target:
        json.dump(fields, target)


def test_documents_are_led_by_the_marker(path):
    store = open_verified(path)
    assert store.meta.num_documents == 3
    assert store.documents[:].tolist() == [0, 6, 13, 1014]
    assert store.tokens.dtype == np.uint8
    assert bytes(store.tokens[:]) == b"".join(b"\0" + text.encode() for text in TEXTS)
    assert store.meta.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_store_holds_its_tokenizer(tmp_path):
    source = write_tokenizer_json(tmp_path / "tokenizer.json", ["<end>"], words=["hello"])
    store = write_store(tmp_path / "store", TEXTS, load_tokenizer(source, "<end>"))
    os.remove(source)
    moved = shutil.move(store.path, tmp_path / "moved")
    store = open_verified(moved)
    tokenizer = store.load_tokenizer()
    assert store.tokens.dtype == np.uint16
    assert tokenizer.eod_id == store.meta.eod_id
    assert tokenizer.vocab_size == store.meta.vocab_size
    first = store.tokens[store.documents[0] : store.documents[1]]
    assert first[0] == tokenizer.eod_id
    assert tokenizer.decode(first) == TEXTS[0]


def test_tokenizer_that_was_exchanged(tmp_path):
    source = write_tokenizer_json(tmp_path / "tokenizer.json", words=["hello"])
    store = write_store(tmp_path / "store", TEXTS, load_tokenizer(source))
    write_tokenizer_json(os.path.join(store.path, "tokenizer.json"), words=["other"])
    with pytest.raises(ValueError, match="fingerprint"):
        store.load_tokenizer()


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no token store at .*nowhere: the folder does not exist"):
        TokenStore.open(str(tmp_path / "nowhere"))


def test_folder_that_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="is not a token store.*no meta.json"):
        TokenStore.open(str(tmp_path))


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, not a token store"):
        TokenStore.open(str(tmp_path / "file"))


def test_unreadable_meta(path):
    os.remove(os.path.join(path, "meta.json"))
    os.mkdir(os.path.join(path, "meta.json"))
    with pytest.raises(ValueError, match="cannot read .*meta.json"):
        TokenStore.open(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_meta(path):
    os.chmod(os.path.join(path, "meta.json"), 0)
    with pytest.raises(ValueError, match="cannot read .*meta.json: Permission denied"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_missing_file(path, name):
    os.remove(os.path.join(path, name))
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size(path, name, change):
    file = os.path.join(path, name)
    os.truncate(file, os.path.getsize(file) + change)
    with pytest.raises(ValueError, match=f"truncated or damaged: {name} has"):
        TokenStore.open(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "else"}', '{"a": "\udcff"}'])
def test_meta_that_is_not_ours(path, content):
    with open(os.path.join(path, "meta.json"), "w", errors="surrogateescape") as file:
        file.write(content)
    with pytest.raises(ValueError, match="cannot use the token store .*: meta.json: "):
        TokenStore.open(path)


def test_version_from_the_future(path):
    edit_meta(path, version=3)
    with pytest.raises(ValueError, match="format version 3: expected 1 or 2"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    "changes",
    [{"num_tokens": 5}, {"num_documents": 2}, {"dtype": "<u4"}, {"dtype": "?!"}, {"files": {}}],
)
def test_meta_that_contradicts_itself(path, changes):
    edit_meta(path, **changes)
    with pytest.raises(ValueError, match="cannot use the token store .*: meta.json: its "):
        TokenStore.open(path)


def test_meta_with_another_field(path):
    edit_meta(path, color="green")
    with pytest.raises(ValueError, match="its fields .*color"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    "offsets, problem",
    [
        ([1, 6, 13, 1014], "the first is 1"),
        ([0, 6, 13, 1013], "the last is 1013"),
        ([0, 13, 6, 1014], "document 1 would start at 13 and end at 6"),
        ([0, 6, 6, 1014], "document 1 would start at 6 and end at 6"),
        ([0, -6, 13, 1014], "document 0 would start at 0 and end at -6"),
    ],
)
@pytest.mark.parametrize("piece_size", [1, 2, 1 << 20])
def test_damaged_offsets(path, offsets, problem, piece_size, monkeypatch):
    monkeypatch.setattr(token_store, "_PIECE", piece_size)
    np.array(offsets, np.int64).tofile(os.path.join(path, "documents.bin"))
    with pytest.raises(ValueError, match=f"documents.bin do not rise from 0 to 1014 .*{problem}"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    "entries, problem",
    [
        ([[2, 1], [2, 1], [8, 3]], "entry 1 of text_bytes.bin gives token 2 1 bytes"),
        ([[2, 1], [4, 1], [3, 3]], "entry 2 of text_bytes.bin gives token 3 3 bytes"),
        ([[-1, 1], [4, 1], [8, 3]], "entry 0 of text_bytes.bin gives token -1"),
        ([[2, 1], [4, 1], [1014, 3]], "entry 2 of text_bytes.bin gives token 1014"),
        ([[2, 1], [4, -1], [8, 3]], "entry 1 of text_bytes.bin gives token 4 -1 bytes"),
        ([[2, 1], [4, 2000], [8, 3]], "entry 1 of text_bytes.bin gives token 4 2000 bytes"),
    ],
)
@pytest.mark.parametrize("piece_size", [1, 2, 1 << 20])
def test_damaged_corrections(path, entries, problem, piece_size, monkeypatch):
    monkeypatch.setattr(token_store, "_PIECE", piece_size)
    file = os.path.join(path, "text_bytes.bin")
    files = TokenStore.open(path).meta.files
    for values in ([[2, 1], [4, 1], [8, 3]], entries):
        np.array(values, np.int64).tofile(file)
        edit_meta(path, files=files | {"text_bytes.bin": {"bytes": 48, "sha256": "0" * 64}})
        if values is not entries:
            assert len(TokenStore.open(path).corrections) == 3
    with pytest.raises(ValueError, match=f"{problem}.*; expected ascending tokens from 0 to 1013"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
def test_a_pipe_is_not_waited_for(path, name):
    os.remove(os.path.join(path, name))
    os.mkfifo(os.path.join(path, name))
    with pytest.raises(ValueError, match=f"cannot read .*{name}: it is not a regular file"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
def test_links(path, tmp_path, name):
    """Links may lead to the store, and in the cache of Hugging Face to its blobs, but no others."""
    os.symlink(path, tmp_path / "link")
    assert TokenStore.open(str(tmp_path / "link")).meta.num_documents == 3
    file, cache = os.path.join(path, name), tmp_path / "hub" / "datasets--me--mine"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(file, cache / "blobs" / "a1b2")
    os.symlink(cache / "blobs" / "a1b2", file)
    for folder in (path, str(tmp_path / "link")):
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of .*a1b2"):
            TokenStore.open(folder)
    snapshot = shutil.move(path, cache / "snapshots" / "c3d4")
    assert TokenStore.open(str(snapshot)).meta.num_documents == 3


def test_huge_meta(path):
    with open(os.path.join(path, "meta.json"), "a") as file:
        file.truncate(1 << 40)  # A sparse file.
    with pytest.raises(ValueError, match="meta.json: it has more than 1,048,576 bytes"):
        TokenStore.open(path)


@pytest.mark.parametrize("changes", [{"eod_id": 5, "bos_id": 5}, {"eod_token": "<end>"}])
def test_markers_that_are_not_the_tokenizers(path, changes):
    edit_meta(path, **changes)
    with pytest.raises(ValueError, match="eod_.* meta.json says "):
        TokenStore.open(path).load_tokenizer()


def test_verify_finds_a_changed_byte(path):
    with open(os.path.join(path, "tokens.bin"), "r+b") as file:
        file.seek(500)
        file.write(b"y")
    TokenStore.open(path)
    with pytest.raises(ValueError, match="SHA-256 of tokens.bin"):
        open_verified(path)


@pytest.mark.parametrize("name", ["text.txt", "folder"])
def test_text_in_place_of_a_store_is_answered_with_the_tool_that_makes_one(tmp_path, name):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(ValueError, match=f"tools:prepare_data -- --output=FOLDER --input={path}$"):
        TokenStore.open(str(path))
