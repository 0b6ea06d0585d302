import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xlstm.dataset.document_readers import read_blocks


def texts_of(*paths, column="text"):
    blocks = read_blocks([str(path) for path in paths], column)
    return [text for block in blocks for text in block.texts()]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(path, texts):
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_text_files(tmp_path):
    one = write(tmp_path / "one.txt", "first\r\nläst\n")
    two = write(tmp_path / "two.md", b"\xef\xbb\xbfwith a byte-order mark")
    assert texts_of(two, one) == ["with a byte-order mark", "first\r\nläst\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    content = '{"text": "a\\u00e4\\n"}\n\n{"id": 1, "text": ""}\n{"text": null}\n{"text": "end"}'
    write(path, gzip.compress(content.encode()) if suffix.endswith("gz") else content)
    assert texts_of(path) == ["aä\n", "", "", "end"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    texts = [f"döc {i}" for i in range(1000)] + [None, "end"]
    table = pa.table({"id": range(len(texts)), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "file.parquet", row_group_size=300)
    expected = [text or "" for text in texts]
    assert texts_of(tmp_path / "file.parquet", column="body") == expected


def test_blocks_are_small_and_add_up(tmp_path):
    texts = [str(i) * 1000 for i in range(1000, 2000)]
    paths = [write_lines(tmp_path / "a.jsonl", texts), tmp_path / "b.jsonl.gz"]
    write(paths[1], gzip.compress(paths[0].read_bytes()))
    paths.append(tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": texts}), paths[2])
    paths += [write(tmp_path / f"{i}.txt", text * 100) for i, text in enumerate(texts[:8])]
    blocks = list(read_blocks([str(path) for path in paths], "text"))
    assert sum(block.input_bytes for block in blocks) == sum(p.stat().st_size for p in paths)
    assert len(blocks) > 10
    assert all(sum(map(len, block.texts())) < 2_000_000 for block in blocks)
    assert [text for block in blocks for text in block.texts()] == texts * 3 + [
        text * 100 for text in texts[:8]
    ]


def test_order_is_that_of_the_files(tmp_path):
    paths = [
        write(tmp_path / "a.txt", "1"),
        write_lines(tmp_path / "b.jsonl", ["2", "3"]),
        write(tmp_path / "c.txt", "4"),
    ]
    assert texts_of(*paths) == ["1", "2", "3", "4"]
    assert texts_of(*reversed(paths)) == ["4", "2", "3", "1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": }', r"not JSON \(Expecting value, column 10\)"),
        ("[1, 2]", r"not a JSON object, but \[1, 2\]"),
        ('{"body": "x", "id": 3}', r"""no 'text' among its keys \["body", "id"\]"""),
        ('{"text": 5}', "'text' is not a string, but 5"),
        (b'{"text": "\xe9"}', r"not UTF-8 text \(byte 0xe9\)"),
        ('{"text": "\\ud800"}', "'text' is not valid Unicode: surrogates not allowed"),
    ],
)
def test_bad_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "bad.jsonl", b'{"text": "x"}\n' * 30_000 + line + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 30001: {message}"):
        texts_of(path)


def test_text_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "bad.txt", b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"bad.txt, line 3: not UTF-8 text \(byte 0xe9\)"):
        texts_of(path)


@pytest.mark.parametrize("content", [b"plain", gzip.compress(b"x" * 100_000)[:-20]])
def test_damaged_gzip(tmp_path, content):
    path = write(tmp_path / "bad.jsonl.gz", content)
    with pytest.raises(ValueError, match="bad.jsonl.gz is not a whole gzip file"):
        texts_of(path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "bad.parquet"
    with pytest.raises(ValueError, match="cannot read .*bad.parquet as Parquet"):
        texts_of(write(path, b"plain"))
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), path)
    with pytest.raises(ValueError, match=r"""no column 'body', only \["text", "number"\]"""):
        texts_of(path, column="body")
    with pytest.raises(ValueError, match="'number' of .*bad.parquet holds int64, not text"):
        texts_of(path, column="number")
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xe9"]).buffers())
    pq.write_table(pa.table({"text": wrong}), path)
    with pytest.raises(ValueError, match="bad.parquet, row 2: not UTF-8 text"):
        texts_of(path)


def test_missing_file(tmp_path):
    for name in ("no.txt", "no.jsonl"):
        with pytest.raises(OSError, match=name):
            texts_of(tmp_path / name)
