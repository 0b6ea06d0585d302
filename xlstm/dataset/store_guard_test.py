import itertools
import os
import shutil
import threading
import time

import pytest

from xlstm.dataset import store_guard
from xlstm.dataset.store_data import train_batches
from xlstm.dataset.store_guard import StoreGuard
from xlstm.dataset.testing import assert_equal_batches, config_for, write_letter_store
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.validation import open_validation_sets
from xlstm.testing.patience import PATIENCE, wait_until

LONG_AGO = time.time_ns() - 10**12


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Makes guards look often, and gives each test its own cache."""
    monkeypatch.setattr(store_guard, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(store_guard, "_YOUNG_NS", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """Returns the list of the paths of stores that a guard's thread has looked at, in order."""
    paths, look_at = [], StoreGuard._look_at

    def look(guard, store):
        look_at(guard, store)
        paths.append(store.path)

    monkeypatch.setattr(StoreGuard, "_look_at", look)
    return paths


@pytest.fixture
def large(monkeypatch):
    """Makes every store too large to be verified before the work."""
    monkeypatch.setattr(store_guard, "_SMALL", 0)


@pytest.fixture
def verified(monkeypatch):
    """Returns the list of the paths of verified stores, in order."""
    paths, verify_store = [], store_guard.verify_store

    def verify(store, *args):
        paths.append(os.path.basename(store.path))
        return verify_store(store, *args)

    monkeypatch.setattr(store_guard, "verify_store", verify)
    return paths


@pytest.fixture
def store(tmp_path):
    return write_letter_store(tmp_path / "store")


def change_byte(path, offset=501):
    """Replaces a letter by another one, in place."""
    with open(os.path.join(path, "tokens.bin"), "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte + 1]))


def guard(*stores, said=None, everything=False):
    """Returns a guard after `verify_first`."""
    watching = StoreGuard(stores, [].append if said is None else said.append)
    watching.verify_first(everything)
    return watching


def wait_for_looks(looks, *stores):
    """Waits until a guard's thread has looked at each store once more."""
    before = len(looks)
    wait_until(lambda: {store.path for store in stores} <= set(looks[before:]))


def read_until_error(batches):
    deadline = time.monotonic() + PATIENCE
    with pytest.raises(ValueError) as error:
        while time.monotonic() < deadline:
            next(batches)
    return str(error.value)


def test_small_stores_are_verified_at_once_and_then_known(store, verified):
    guard(store)
    assert verified == ["store"]
    guard(TokenStore.open(store.path))
    assert verified == ["store"]
    guard(store, everything=True)
    assert verified == ["store", "store"]
    change_byte(store.path)
    for _ in range(2):  # A damaged store is not recorded.
        with pytest.raises(ValueError, match="store is damaged: the SHA-256 of tokens.bin"):
            guard(TokenStore.open(store.path))


def test_a_known_store_is_verified_anew_if_asked(store, monkeypatch):
    """A failing disk changes bytes without changing the identity."""
    guard(store)
    change_byte(store.path)
    monkeypatch.setattr(store_guard, "was_verified", lambda identity: True)
    guard(store)
    with pytest.raises(ValueError, match="SHA-256 of tokens.bin"):
        guard(store, everything=True)


def test_two_paths_and_a_link_to_one_store(store, tmp_path, verified, looks):
    os.symlink(store.path, tmp_path / "link")
    stores = [store, TokenStore.open(str(tmp_path / "link")), TokenStore.open(store.path), store]
    with guard(*stores):
        wait_for_looks(looks, *stores)
    assert verified == ["store"]
    guard(TokenStore.open(shutil.move(store.path, tmp_path / "moved")))
    assert verified == ["store"]


def test_a_cache_that_cannot_be_written(store, monkeypatch, verified, looks):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    for count in (1, 2):
        with guard(store):
            wait_for_looks(looks, store)
        assert verified == ["store"] * count


def test_what_was_written_just_now_is_not_remembered(store, monkeypatch, verified):
    monkeypatch.setattr(store_guard, "_YOUNG_NS", 10**12)
    for count in (1, 2):
        guard(store)
        assert verified == ["store"] * count


def test_stores_that_are_small_only_one_by_one(tmp_path, monkeypatch, verified):
    stores = [write_letter_store(tmp_path / str(i), documents=30 + 10 * i) for i in range(3)]
    sizes = [sum(file.num_bytes for file in store.files.values()) for store in stores]
    monkeypatch.setattr(store_guard, "_SMALL", sizes[0] + sizes[1])
    said = []
    watching = guard(*stores[::-1], said=said)
    assert verified == ["0", "1"]
    with watching:
        wait_until(lambda: verified == ["0", "1", "2"])
    assert len(said) == 1 and "verifying the token store" in said[0] and "/2 (" in said[0]


def test_large_stores_are_verified_beside_the_work(large, store, verified, looks):
    config, said = config_for(store), []
    with guard(store, said=said):
        batches = list(itertools.islice(train_batches(config, [store]), 20))
        wait_for_looks(looks, store)
    assert verified == ["store"]
    assert said[0] == f"verifying the token store {store.path} (0.0 GB) in the background"
    assert_equal_batches(batches, list(itertools.islice(train_batches(config, [store]), 20)))
    with guard(TokenStore.open(store.path)):
        wait_for_looks(looks, store)
    assert verified == ["store"]


def test_the_work_ends_if_a_large_store_is_damaged(large, store):
    change_byte(store.path)
    config = config_for(store)
    with pytest.raises(ValueError, match="the SHA-256 of tokens.bin .* may be wrong"):
        with guard(store):
            batches = train_batches(config, [store])
            assert "changed while" not in read_until_error(batches)
            (held_out,) = open_validation_sets(config, [store])
            assert "the SHA-256 of tokens.bin" in read_until_error(held_out.batches())


def test_a_store_that_was_touched_goes_on(store, verified):
    with guard(store):
        batches = train_batches(config_for(store), [store])
        for name in ("tokens.bin", "documents.bin"):
            count = len(verified)
            os.utime(os.path.join(store.path, name), ns=(LONG_AGO, LONG_AGO))
            wait_until(lambda count=count: len(verified) > count)
            next(batches)
    assert len(verified) == 3


def test_a_store_that_is_written_to_in_use(store):
    with pytest.raises(ValueError, match="its files were changed while they were in use"):
        with guard(store):
            batches = train_batches(config_for(store), [store])
            next(batches)
            change_byte(store.path)
            os.utime(os.path.join(store.path, "tokens.bin"), ns=(LONG_AGO, LONG_AGO))
            message = read_until_error(batches)
            assert f"the token store {store.path} is damaged: the SHA-256 of tokens.bin" in message


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_store_that_shrinks_in_use(store, name):
    with pytest.raises(ValueError, match=f"{name} has shrunk while it was in use"):
        with guard(store):
            batches = train_batches(config_for(store), [store])
            next(batches)
            os.truncate(os.path.join(store.path, name), 100)
            assert f"{name} has shrunk while it was in use" in read_until_error(batches)
            wait_until(lambda: store.problem)


def test_reading_tells_that_a_file_has_shrunk(store):
    """The threads that read ahead notice it even without a guard."""
    batches = train_batches(config_for(store), [store])
    next(batches)
    os.truncate(os.path.join(store.path, "tokens.bin"), 100)
    assert "tokens.bin has shrunk while it was in use" in read_until_error(batches)


def test_another_store_in_its_place_plays_no_part(store, tmp_path, looks):
    config = config_for(store)
    expected = list(itertools.islice(train_batches(config, [store]), 40))
    other = write_letter_store(tmp_path / "other", seed=1)
    with guard(store):
        batches = train_batches(config, [store])
        first = list(itertools.islice(batches, 5))
        for name in os.listdir(other.path):
            os.replace(os.path.join(other.path, name), os.path.join(store.path, name))
        wait_for_looks(looks, store)
        shutil.rmtree(store.path)
        wait_for_looks(looks, store)
        assert_equal_batches(first + list(itertools.islice(batches, 35)), expected)


@pytest.mark.parametrize("is_locked", [False, True])
def test_the_end_waits_for_no_verification(large, store, monkeypatch, looks, is_locked):
    monkeypatch.setattr(store_guard, "_SECONDS_TO_STOP", PATIENCE)
    said, has_begun = [], threading.Event()

    def never_done(store, is_wanted):
        has_begun.set()
        while is_wanted():
            time.sleep(0.001)
        return False

    watching = guard(store, said=said)
    if is_locked:  # Another process verifies.
        monkeypatch.setattr(store_guard, "verification_lock", lambda identity: _context(False))
    else:
        monkeypatch.setattr(store_guard, "verify_store", never_done)
    with watching:
        if is_locked:
            wait_for_looks(looks, store)
        else:
            assert has_begun.wait(PATIENCE)
    assert not watching._thread.is_alive()
    assert said[1].endswith("store (0.0 GB) was not fully verified: use --verify_data")


def test_a_change_at_the_last_moment(store, monkeypatch, looks):
    monkeypatch.setattr(store_guard, "_SECONDS_BETWEEN_LOOKS", PATIENCE)
    said = []
    with guard(store, said=said):
        wait_until(lambda: looks)  # The next look is long after the end.
        assert not said
        change_byte(store.path)
    assert said[0].endswith("was not fully verified: use --verify_data")


@pytest.mark.parametrize("is_raised", [False, True])
def test_damage_found_at_the_last_moment(large, store, is_raised):
    change_byte(store.path)
    with pytest.raises(KeyError if is_raised else ValueError, match="a" if is_raised else "SHA"):
        with guard(store):
            wait_until(lambda: store.problem)
            if is_raised:  # The error of the work takes precedence.
                raise KeyError("a")


def test_a_disk_without_the_right_to_write(store, verified):
    for name in os.listdir(store.path):
        os.chmod(os.path.join(store.path, name), 0o444)
    os.chmod(store.path, 0o555)
    before = sorted(os.listdir(store.path))
    guard(TokenStore.open(store.path))
    guard(TokenStore.open(store.path))
    assert verified == ["store"] and sorted(os.listdir(store.path)) == before
    os.chmod(store.path, 0o755)


class _context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        pass
