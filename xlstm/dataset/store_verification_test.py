"""Tests of verifying token stores."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from xlstm.dataset import store_verification
from xlstm.dataset.store_verification import (
    mark_verified,
    store_identity,
    verification_lock,
    verify_store,
    was_verified,
)
from xlstm.dataset.testing import open_verified, tokenizer_families, write_store
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import load_tokenizer


def test_it_is_remembered_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not was_verified("one")
    mark_verified("one")
    assert was_verified("one") and not was_verified("two")
    mark_verified("one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert not was_verified("one")


@pytest.mark.parametrize("cache", ["", "relative"])
def test_without_such_a_cache_it_is_that_of_the_home(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mark_verified("one")
    assert was_verified("one") and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/nothing", None])
def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    if cache is None:  # No home directory is known.
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    mark_verified("one")
    assert not was_verified("one") and os.listdir(tmp_path) == []
    with verification_lock("one") as first, verification_lock("one") as second:
        assert first and second


def test_one_verifies_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with verification_lock("one") as first, verification_lock("one") as second:
        assert first and not second
        with verification_lock("two") as other:
            assert other
    with pytest.raises(ValueError, match="damaged"):
        with verification_lock("one") as after:
            assert after
            raise ValueError("damaged")
    with verification_lock("one") as after:
        assert after
    assert not was_verified("one")
    assert os.listdir(tmp_path / "xlstm" / "verified_stores") == []


TEXTS = ["the cat sat", "größte Stadt! 你好", "on a mat", "x" * 50, "café"]


@pytest.fixture(scope="module", params=["<s>", None], ids=["two markers", "one marker"])
def original(request, tmp_path_factory):
    """Returns a store that has every optional file."""
    folder = tmp_path_factory.mktemp("verification")
    (folder / "tokenizer.json").write_bytes(tokenizer_families()["byte_level_prefix"])
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), "</s>", request.param)
    write_store(folder / "store", TEXTS, tokenizer)
    assert len(os.listdir(folder / "store")) == 5
    return folder / "store"


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.fixture(params=[1 << 21, 48, 16])
def piece_size(request, monkeypatch):
    """Sets the number of bytes per piece."""
    monkeypatch.setattr(store_verification, "_PIECE", request.param)


def tokens_of(path):
    return np.fromfile(path / "tokens.bin", "<u2")


def exchange_tokens(path, tokens):
    """Writes other tokens with their checksum, as another program might."""
    tokens.tofile(path / "tokens.bin")
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["tokens.bin"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))


def test_what_was_written_is_right(path, piece_size):
    assert verify_store(TokenStore.open(str(path)))


def test_stores_of_version_1(path):
    meta = json.loads((path / "meta.json").read_text())
    has_one_marker = meta["bos_id"] == meta["eod_id"]
    for name in ("bos_id", "bos_token"):
        del meta[name]
    (path / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    if has_one_marker:
        assert open_verified(path).load_tokenizer().eod_token == "</s>"
    else:  # Version 1 has only one marker.
        with pytest.raises(ValueError, match="documents start with the marker"):
            open_verified(path)


@pytest.mark.parametrize(
    "name", ["tokens.bin", "documents.bin", "text_bytes.bin", "tokenizer.json"]
)
def test_every_flipped_bit_is_found(path, name):
    rng = np.random.default_rng(0)
    content = (path / name).read_bytes()
    for offset in [0, len(content) - 1, *rng.integers(0, len(content), 20)]:
        flipped = bytearray(content)
        flipped[offset] ^= 1 << rng.integers(0, 8)
        (path / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"the token store .*copy is damaged.*{name}"):
            open_verified(path)


def test_flipped_bits_of_meta_json_change_nothing_in_silence(path):
    rng = np.random.default_rng(0)
    content = (path / "meta.json").read_bytes()
    meta, num_found = TokenStore.open(str(path)).meta, 0
    for offset in rng.integers(0, len(content), 200):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << rng.integers(0, 8)
        (path / "meta.json").write_bytes(flipped)
        try:
            store = open_verified(path)
            store.load_tokenizer()
        except ValueError:
            num_found += 1
        else:  # Only the shown total of text bytes, or white space, differs.
            assert vars(store.meta) | {"text_bytes": meta.text_bytes} == vars(meta)
    assert num_found > 100


def test_zeros_of_the_right_size(path):
    size = os.path.getsize(path / "tokens.bin")
    os.truncate(path / "tokens.bin", 0)
    os.truncate(path / "tokens.bin", size)  # A sparse file.
    with pytest.raises(ValueError, match="copy is damaged, or .* is 0, but documents"):
        open_verified(path)


@pytest.mark.parametrize("position", [1, 17, -2])
def test_ids_outside_the_vocabulary(path, position, piece_size):
    tokens, store = tokens_of(path), TokenStore.open(str(path))
    size = store.meta.vocab_size
    tokens[position] = size
    exchange_tokens(path, tokens)
    index = range(len(tokens))[position]
    document = np.searchsorted(store.documents[:], index, side="right") - 1
    with pytest.raises(
        ValueError,
        match=rf"copy is damaged, or was not written with its tokenizer: token {index} of"
        rf" tokens.bin \(document {document}, .*\) is {size}, but the largest id .* is {size - 1}",
    ):
        open_verified(path)


@pytest.mark.parametrize("kind", ["begin", "end", "inside"])
def test_markers_elsewhere(path, kind, piece_size):
    tokens, store = tokens_of(path), TokenStore.open(str(path))
    meta, (begin, end) = store.meta, store.documents[2:4]
    if kind == "end" and meta.bos_id == meta.eod_id:
        end += 1  # The start of the next document.
    index = {"begin": begin, "end": end - 1, "inside": begin + 2}[kind]
    tokens[index] = meta.eod_id if kind == "inside" else 100
    exchange_tokens(path, tokens)
    with pytest.raises(
        ValueError, match=rf"token {index} of tokens.bin .* is {tokens[index]}, but documents start"
    ):
        open_verified(path)


def test_it_ends_when_it_is_not_wanted(path):
    (path / "tokens.bin").write_bytes(b"\0" * os.path.getsize(path / "tokens.bin"))
    assert not verify_store(TokenStore.open(str(path)), lambda: False)


def test_identity_is_that_of_the_files_and_not_of_the_path(path, tmp_path):
    identity = store_identity(TokenStore.open(str(path)))
    os.symlink(path, tmp_path / "link")
    assert store_identity(TokenStore.open(str(tmp_path / "link"))) == identity
    moved = shutil.move(path, tmp_path / "moved")
    assert store_identity(TokenStore.open(str(moved))) == identity
    copy = shutil.copytree(moved, tmp_path / "another")
    assert store_identity(TokenStore.open(str(copy))) != identity


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "text_bytes.bin", "meta.json"])
def test_identity_differs_after_a_change(path, name):
    before = TokenStore.open(str(path))
    identity = store_identity(before)
    if name == "meta.json":
        text = (path / name).read_text()
        (path / name).write_text(text.replace(before.meta.files["tokens.bin"]["sha256"], "0" * 64))
    else:
        os.utime(path / name)
        assert store_identity(before) != identity
    assert store_identity(TokenStore.open(str(path))) != identity
