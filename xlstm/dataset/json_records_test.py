import codecs
import gzip
import json

import pytest

from xlstm.dataset import json_records
from xlstm.dataset.json_records import json_blocks

RECORDS = [
    {"text": f'nö {i} "quoted", \\ \n{{[' * (i % 7), "n": [i, 1.5, None, {"text": "in"}]}
    for i in range(500)
]
TEXTS = [record["text"] for record in RECORDS]
LAYOUTS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "lines with blank ones": "\n\n \r\n".join(map(json.dumps, RECORDS)) + "\n\n",
    "array": json.dumps(RECORDS, ensure_ascii=False),
    "array of several lines": "\n" + json.dumps(RECORDS, indent=2) + "\n",
    "a line each, in an array": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "objects of several lines": "\n".join(json.dumps(r, indent=1) for r in RECORDS),
    "objects without anything between": "".join(json.dumps(r, indent=1) for r in RECORDS),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts_of(path, column="text", is_lines=False, on_bad_record=None):
    blocks = json_blocks(path, column, is_lines)
    return [text for block in blocks for text in block.texts(on_bad_record)]


@pytest.mark.parametrize("block_bytes", [2, 50, 1000, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, monkeypatch, layout, block_bytes):
    monkeypatch.setattr(json_records, "_BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "file.json", LAYOUTS[layout])
    assert texts_of(path) == TEXTS
    path = write(tmp_path / "file.json.gz", gzip.compress(LAYOUTS[layout].encode()))
    assert texts_of(path) == TEXTS
    path = write(tmp_path / "file.json", codecs.BOM_UTF8 + LAYOUTS[layout].encode())
    assert block_bytes < 50 or texts_of(path) == TEXTS


def test_a_single_object(tmp_path):
    for indent in (None, 2):
        path = write(tmp_path / "file.json", json.dumps({"text": "only", "x": {}}, indent=indent))
        assert texts_of(path) == ["only"]


@pytest.mark.parametrize("content", ["", "\n", "[]", " [ ] \n"])
def test_no_record(tmp_path, content):
    assert texts_of(write(tmp_path / "file.json", content)) == []


def test_blocks_of_an_array_are_small_and_add_up(tmp_path):
    texts = [str(i) * 1000 for i in range(1000, 2000)]
    path = write(tmp_path / "file.json", json.dumps([{"text": text} for text in texts], indent=1))
    blocks = list(json_blocks(path, "text", is_lines=False))
    assert [text for block in blocks for text in block.texts()] == texts
    assert max(sum(map(len, block.texts())) for block in blocks) < 2_000_000
    assert sum(block.input_bytes for block in blocks) == (tmp_path / "file.json").stat().st_size


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "a"}, {"text": "b"', 'record 2: not JSON .*\'{"text": "b"\''),
        ('[{"text": "a"}', "record 1: the end of the file follows instead of ',' or ']'"),
        ('[{"text": "a"},]', "record 2: not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "record 1: .* follows instead of ',' or ']'"),
        ('[{"text": "a"}] garbage', "record 1: 'garbage' follows the last record"),
        ('[{"text": "a"}]' + "\0" * 5, "record 1: .* follows the last record"),
        ('[{"text": "a"}, {"text": b}, ' + '{"text": "c"}, ' * 10_000, "record 2: not JSON"),
        ("[" * 100_000, "record 1: it is nested too deeply"),
        ('{\n"text": "a"\n}\n{\n"text": ]', "record 2: not JSON"),
    ],
)
def test_a_damaged_array(tmp_path, content, message):
    path = write(tmp_path / "file.json", content)
    for on_bad_record in (None, [].append):  # The next record cannot be found.
        with pytest.raises(
            ValueError, match=f"file.json, {message}.*; the rest of the file cannot be"
        ):
            texts_of(path, on_bad_record=on_bad_record)


def test_a_malformed_value_does_not_make_the_rest_be_read(tmp_path):
    path = write(
        tmp_path / "file.json", '[{"text": "a"}, {"text": b}, ' + '{"text": "c"}, ' * 500_000
    )
    blocks = json_blocks(path, "text", is_lines=False)
    with pytest.raises(ValueError, match="record 2") as caught:
        list(blocks)
    assert len(caught.traceback[-1].locals["self"]._buffer) < 2_000_000


def test_bad_records_of_an_array(tmp_path):
    content = b'[{"text": "a"}, 5, {"text": "\xe9"}, {"x": 1}, {"text": "b", "n": ' + b"9" * 5000
    path = write(tmp_path / "file.json", content + b'}, {"text": "\\ud83d "}, {"text": "c"}]')
    bad = []
    assert texts_of(path, on_bad_record=bad.append) == ["a", "c"]
    assert [message.removeprefix(path) for message in bad] == [
        ", record 2: not a JSON object, but 5",
        ", record 3: not UTF-8 text (byte 0xe9)",
        """, record 4: no 'text' among its keys ["x"]""",
        ", record 5: it holds a number with too many digits",
        ", record 6: 'text' is not valid Unicode: surrogates not allowed",
    ]
    with pytest.raises(ValueError, match="file.json, record 2: not a JSON object"):
        texts_of(path)


def test_a_number_that_ends_in_the_next_piece_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_BLOCK_BYTES", 3)
    path = write(tmp_path / "file.json", '[12345, {"text": "a"}, 67890]')
    bad = []
    assert texts_of(path, on_bad_record=bad.append) == ["a"]
    assert [message.rpartition(" ")[2] for message in bad] == ["12345", "67890"]


def test_keys_within_objects(tmp_path):
    lines = [
        {"data": {"text": "inner", "more": {"text": "innermost"}}},
        {"data": {"text": "inner"}, "data.text": "by its own name"},
        {"data": None},
        {"data": {"text": None}},
        {"data": 5},
        {"data": {"body": ""}},
        {"text": "outer"},
    ]
    path = write(tmp_path / "file.jsonl", "\n".join(map(json.dumps, lines)))
    bad = []
    assert texts_of(path, "data.text", on_bad_record=bad.append) == [
        "inner",
        "by its own name",
        "",
        "",
    ]
    assert [message.partition(", ")[2] for message in bad] == [
        "line 5: 'data' is not an object, but 5",
        """line 6: no 'text' among its keys ["body"]""",
        """line 7: no 'data.text' among its keys ["text"]""",
    ]
    assert texts_of(path, "data.more.text", on_bad_record=bad.append)[0] == "innermost"


def test_other_formats(tmp_path):
    for content, message in {
        LAYOUTS["lines"].encode("utf-16"): "holds UTF-16 text: convert it",
        LAYOUTS["lines"].encode("utf-16-le"): "holds UTF-16LE text: convert it",
        b"version https://git-lfs.github.com/spec/v1\noid": "holds a Git LFS pointer",
        gzip.compress(b'{"text": "a"}'): "holds gzip data",
    }.items():
        with pytest.raises(ValueError, match=f"file.jsonl {message}"):
            texts_of(write(tmp_path / "file.jsonl", content), is_lines=True)


def test_place(tmp_path):
    lines = '{"text": "a"}\n\nbad\n{"text": "b"}\n'
    path = write(tmp_path / "file.jsonl", lines * 2)
    (block,) = json_blocks(path, "text", is_lines=True)
    assert list(block.texts(lambda message: None)) == ["a", "b"] * 2
    locations = [block.location(index) for index in range(4)]
    assert locations == [f"{path}, line {number}" for number in (1, 4, 5, 8)]
    path = write(tmp_path / "file.json", '[{"text": "a"}, 1, {"text": "b"}]')
    (block,) = json_blocks(path, "text", is_lines=False)
    assert block.location(1) == f"{path}, record 3"
