import os

import pytest

from xlstm.dataset.verified_stores import is_remembered, remember, sole_verifier


def test_it_is_remembered_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not is_remembered("one")
    remember("one")
    assert is_remembered("one") and not is_remembered("two")
    remember("one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert not is_remembered("one")


@pytest.mark.parametrize("cache", ["", "relative"])
def test_without_such_a_cache_it_is_that_of_the_home(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remember("one")
    assert is_remembered("one") and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/nothing", None])
def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    if cache is None:  # A home that nobody knows.
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    remember("one")
    assert not is_remembered("one") and os.listdir(tmp_path) == []
    with sole_verifier("one") as first, sole_verifier("one") as second:
        assert first and second


def test_one_verifies_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with sole_verifier("one") as first, sole_verifier("one") as second:
        assert first and not second
        with sole_verifier("two") as other:
            assert other
    with pytest.raises(ValueError, match="damaged"):
        with sole_verifier("one") as after:
            assert after
            raise ValueError("damaged")
    with sole_verifier("one") as after:
        assert after
    assert not is_remembered("one")
    assert os.listdir(tmp_path / "xlstm" / "verified_stores") == []
