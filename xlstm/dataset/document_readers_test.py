import bz2
import gzip
import json
import lzma
import pickle

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


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def test_text_files(tmp_path):
    one = write(tmp_path / "one.txt", "first\r\nläst\n")
    two = write(tmp_path / "two.md", b"\xef\xbb\xbfwith a byte-order mark")
    assert texts_of(two, one) == ["with a byte-order mark", "first\r\nläst\n"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson", ".jsonlines", ".json"])
def test_json_lines(tmp_path, ending, compression):
    content = '{"text": "a\\u00e4\\n"}\n\n{"id": 1, "text": ""}\n{"text": null}\r\n{"text": "end"}'
    path = tmp_path / f"c4-train.00000{ending}{compression}"
    write(path, COMPRESS[compression](content.encode()))
    assert texts_of(path) == ["aä\n", "", "", "end"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_an_array_of_objects(tmp_path, compression):
    content = json.dumps([{"text": "one"}, {"text": "two\n"}], indent=1)
    path = write(tmp_path / f"file.json{compression}", COMPRESS[compression](content.encode()))
    assert texts_of(path) == ["one", "two\n"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_compressed_text_file_is_one_document(tmp_path, compression):
    path = tmp_path / f"file.txt{compression}"
    write(path, COMPRESS[compression](b"first line\nsecond line\n"))
    assert texts_of(path) == ["first line\nsecond line\n"]


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
        ("[" * 100_000, "it is nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "it holds a number with too many digits"),
        ('{"text": NaN}', "'text' is not a string, but NaN"),
        ('{"text": "a"}{"text": "b"}', "not JSON .Extra data"),
        ("\0" * 21, "21 NUL bytes, perhaps from a crash or a full disk"),
        ('\0\0{"text": "a"}', "2 NUL bytes, perhaps from a crash or a full disk"),
        ("[", "a value of several lines: rename the file to end in .json"),
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
    with pytest.raises(ValueError, match="bad.jsonl.gz is not a complete gzip file"):
        texts_of(path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "bad.parquet"
    with pytest.raises(ValueError, match="cannot read .*bad.parquet as Parquet"):
        texts_of(write(path, b"plain"))
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), path)
    with pytest.raises(ValueError, match=r"""no column 'body', only \["text", "number"\]"""):
        texts_of(path, column="body")
    with pytest.raises(ValueError, match="'number' of .*bad.parquet holds int64: expected text"):
        texts_of(path, column="number")
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xe9"]).buffers())
    pq.write_table(pa.table({"text": wrong}), path)
    with pytest.raises(ValueError, match="bad.parquet, row 2: not UTF-8 text"):
        texts_of(path)


BAD_LINES = (
    b'{"text": "a"}\n{"text": }\n{"body": "x"}\n{"text": 5}\n\n{"text": "\xe9"}\n{"text": "b"}\n'
)


def test_bad_records_can_be_left_out(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", BAD_LINES),
        write(tmp_path / "b.txt", "text"),
        write(tmp_path / "c.txt", b"caf\xe9"),
        write(tmp_path / "d.txt.gz", gzip.compress(b"packed")),
        write(tmp_path / "e.txt", '{"text": "a"}\n'),
    ]
    blocks = pickle.loads(pickle.dumps(list(read_blocks([str(path) for path in paths], "text"))))
    bad = []
    texts = [text for block in blocks for text in block.texts(bad.append)]
    assert texts == ["a", "b", "text", "packed"]
    locations = [block.location(index) for block in blocks for index in range(2)]
    where = ["a.jsonl, line 1", "a.jsonl, line 7", "b.txt", "d.txt.gz"]
    assert locations == [f"{tmp_path}/{name}" for name in where]
    assert [message.removeprefix(f"{tmp_path}/").partition(":")[0] for message in bad] == [
        *(f"a.jsonl, line {number}" for number in (2, 3, 4, 6)),
        "c.txt, line 1",
        "e.txt holds JSON instead of text",
    ]


@pytest.mark.parametrize("name", ["file.jsonl.gz", "file.txt.gz", "file.json.gz"])
def test_a_damaged_container_is_never_left_out(tmp_path, name):
    damaged = gzip.compress(b'{"text": "a"}\n' * 1000)[:-4]
    path = write(tmp_path / name, damaged)
    with pytest.raises(ValueError, match=f"{name} is not a complete gzip file: its end is missing"):
        [list(block.texts([].append)) for block in read_blocks([str(path)], "text")]


def test_kinds_that_are_not_read(tmp_path):
    path = write(tmp_path / "file.csv", "id,text\n1,a\n")
    with pytest.raises(ValueError, match="file.csv: CSV is not supported: convert it to Parquet"):
        texts_of(path)


def test_missing_file(tmp_path):
    for name in ("no.txt", "no.jsonl"):
        with pytest.raises(OSError, match=name):
            texts_of(tmp_path / name)
