import os

import pytest

from xlstm import inner_file
from xlstm.json_file import parse_json, read_json


def test_an_object(tmp_path):
    (tmp_path / "a.json").write_bytes('{"é": [1, {"a": null}], "a": 1e400}'.encode())
    assert read_json(str(tmp_path / "a.json")) == {"é": [1, {"a": None}], "a": float("inf")}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read: Expecting value"),
        (b'{"a": 1', "cannot be read: Expecting ',' delimiter"),
        (b"[1]", "holds no JSON object"),
        (b'"text"', "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'{"a": "\xff"}', "cannot be read: it is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read: it is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "cannot be read: Unexpected UTF-8 BOM"),
        (b'{"a": 1, "b": 2, "a": 1}', "cannot be read: the field 'a' is there twice"),
        (b'{"b": [{"a": 1, "a": 2}]}', "cannot be read: the field 'a' is there twice"),
        (b'{"a": ' + b"[" * 200_000, "cannot be read: it is nested too deeply"),
        (b'{"a":' * 200_000, "cannot be read: it is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read: Exceeds the limit"),
    ],
    ids=lambda x: x[:20] if isinstance(x, bytes) else "",
)
def test_what_is_none_is_one_sentence(tmp_path, content, message):
    path = str(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    text = str(caught.value)
    assert text.startswith(f"{path} {message}") and "\n" not in text
    with pytest.raises(ValueError, match=f"^there {message}"):
        parse_json(content, "there")


def test_what_is_no_file(tmp_path, monkeypatch):
    path = str(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json is missing$"):
        read_json(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is no file$"):
        read_json(str(tmp_path))
    os.mkfifo(path)  # Nobody ever writes into it.
    with pytest.raises(ValueError, match="a.json is no file$"):
        read_json(path)
    monkeypatch.setattr(inner_file, "MAX_BYTES", 5)
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="b.json has 8 bytes: expected .* at most 5$"):
        read_json(str(tmp_path / "b.json"))
