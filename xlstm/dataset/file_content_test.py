import gzip
import json
import sqlite3
import zipfile

import pytest

from xlstm.dataset.file_content import decode_text, foreign_content

PROSE = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one line",
        PROSE,
        "x, y\n1, 2\n3, 4\n",  # A space after the comma.
        "import os,sys\nprint(os,sys)\n",
        "yes,no\nno more\n",
        "a\tb\n",  # No row.
        "a,b" * 10_000,
        'a,b\n"1\r2,3"\n4\r5,6\n',
        "{ not JSON }\n",
        '{"title": "front matter"}\n\nProse.\n',
        "[1] a footnote\n[2] another\n",
        "[" * 100_000,
        "\\documentclass{article}\n\\begin{document}\n",
        "läst 日本語\r\n",
    ],
)
def test_text(text):
    assert decode_text("file", text.encode()) == text
    assert decode_text("file", b"\xef\xbb\xbf" + text.encode()) == text


@pytest.mark.parametrize(
    "text, kind",
    [
        ('{"text": "a"}\n{"text": "b"}\n', "JSON"),
        ('\n{"text": "a"}\n\n' * 20 + "cut off", "JSON"),
        ('{"text": "a"}', "JSON"),
        (json.dumps({"data": [{"text": "a"}]}, indent=1), "JSON"),
        (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), "JSON"),
        ('[{"text": "a"}, {"text": "cut o', "JSON"),
        ('id,text\n1,hello\n2,"world, all"\n', "CSV"),
        ('id,text\r\n1,hello\r\n2,"of two\r\nlines"\r\n', "CSV"),
        ("id\ttext\n1\thello\n", "CSV"),
        ('"id";"text"\n1;"hello"\n', "CSV"),
        ("id,text\n" + "1,some words\n" * 5000, "CSV"),
    ],
)
def test_data_under_another_name(text, kind):
    with pytest.raises(ValueError, match=f"^file holds {kind} instead of text: "):
        decode_text("file", text.encode())


def sqlite_file(path):
    connection = sqlite3.connect(path)
    connection.execute("create table t (text)")
    connection.commit()
    connection.close()
    return path.read_bytes()


def zip_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    return path.read_bytes()


def test_binary_formats(tmp_path):
    cases = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "a Git LFS pointer",
        gzip.compress(b"text"): "gzip data: rename the file to end in .gz",
        sqlite_file(tmp_path / "a.db"): "an SQLite database",
        zip_file(tmp_path / "a.zip"): "a zip archive",
        PROSE.encode("utf-16"): "UTF-16 text: convert it with 'iconv -f UTF-16 -t UTF-8'",
        PROSE.encode("utf-16-le"): "UTF-16LE text: convert it with 'iconv -f UTF-16LE -t UTF-8'",
        PROSE.encode("utf-16-be"): "UTF-16BE text: convert it with 'iconv -f UTF-16BE -t UTF-8'",
        PROSE.encode("utf-32"): "UTF-32 text",
        b"%PDF-1.4 text": "a PDF document",
    }
    for content, description in cases.items():
        assert foreign_content(content).startswith(description)
        with pytest.raises(ValueError, match=f"^file holds {description}"):
            decode_text("file", content)
    assert foreign_content(PROSE.encode()) is None
    assert foreign_content(b"") is None


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\0" * 1000, r"file, line 1: not text, .* first of 1,000 NUL bytes"),
        (b"text\n" + b"\0" * 21, r"file, line 2: not text, .* first of 21 NUL bytes"),
        ("日本語の文\nつづき".encode("utf-16-le"), "file, line 2: not text"),
        (b"a\nb\ncaf\xe9", r"file, line 3: not UTF-8 text \(byte 0xe9\)"),
    ],
)
def test_content_that_is_not_text(content, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_text("file", content)
