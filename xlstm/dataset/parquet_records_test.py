import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xlstm.dataset.parquet_records import parquet_blocks

STRUCTS = pa.array(
    [{"text": "a", "n": 1}, None, {"text": None, "n": 2}, {"text": "d", "n": 3}],
    pa.struct([("text", pa.string()), ("n", pa.int32())]),
)


def write(path, table, **options):
    pq.write_table(table, path, **options)
    return str(path)


def texts_of(path, column="text", on_bad_record=None):
    return [text for block in parquet_blocks(path, column) for text in block.texts(on_bad_record)]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"data_page_version": "2.0"}])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_kinds_of_text(tmp_path, kind, options):
    texts = ["", "ä\0", None, "some text"] * 1000
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts).cast(kind)})
    path = write(tmp_path / "file.parquet", table, row_group_size=700, **options)
    assert texts_of(path) == [text or "" for text in texts]


def test_a_column_of_nulls_is_empty_documents(tmp_path):
    assert texts_of(write(tmp_path / "a.parquet", pa.table({"text": pa.nulls(3)}))) == [""] * 3
    table = pa.table({"text": pa.array([None, None], pa.string())})
    assert texts_of(write(tmp_path / "b.parquet", table)) == ["", ""]


def test_no_rows(tmp_path):
    path = write(tmp_path / "file.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert texts_of(path) == []


def test_fields_of_structs(tmp_path):
    path = write(tmp_path / "struct.parquet", pa.table({"data": STRUCTS, "text": ["outer"] * 4}))
    assert texts_of(path, "data.text") == ["a", "", "", "d"]
    assert texts_of(path, "text") == ["outer"] * 4
    path = write(tmp_path / "both.parquet", pa.table({"data": STRUCTS, "data.text": ["own"] * 4}))
    assert texts_of(path, "data.text") == ["own"] * 4
    deep = pa.array([{"b": {"c.d": "deep"}}, {"b": None}, None])
    path = write(tmp_path / "deep.parquet", pa.table({"a": deep}))
    assert texts_of(path, "a.b.c.d") == ["deep", "", ""]


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "file.parquet", pa.table({"data": STRUCTS, "n": [1] * 4}))
    for column, message in {
        "text": r"""file.parquet has no column 'text', only \["data", "n"\]""",
        "data.body": r"""file.parquet has no column 'body', only \["text", "n"\]""",
        "n.text": "file.parquet has no column 'n.text'",
        "n": "the column 'n' of .*file.parquet holds int64: expected text",
        "data": "the column 'data' of .*file.parquet holds struct.*: expected text",
        "data.n": "the column 'n' of .*file.parquet holds int32: expected text",
    }.items():
        with pytest.raises(ValueError, match=message):
            texts_of(path, column)


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    with pytest.raises(ValueError, match="file.parquet has 2 columns 'text': rename one"):
        texts_of(write(tmp_path / "file.parquet", table))


def test_text_that_is_not_utf8(tmp_path):
    values = pa.array([b"a", b"\xe9", None, b"d"])
    wrong = pa.Array.from_buffers(pa.string(), 4, values.buffers())
    path = write(tmp_path / "file.parquet", pa.table({"text": wrong}))
    with pytest.raises(ValueError, match="file.parquet, row 2: not UTF-8 text"):
        texts_of(path)
    bad = []
    assert texts_of(path, on_bad_record=bad.append) == ["a", "", "d"]
    assert bad == [f"{path}, row 2: not UTF-8 text"]
    (block,) = parquet_blocks(path, "text")
    locations = [block.location(index) for index in range(3)]
    assert locations == [f"{path}, row {number}" for number in (1, 3, 4)]


def test_damaged_files(tmp_path):
    texts = [f"some text {i}" for i in range(5000)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "file.parquet", pa.table({"text": texts}), **options)
    with open(path, "rb") as file:
        content = file.read()
    changed = bytearray(content)
    changed[5000] ^= 1  # A letter of a text: only the checksum detects it.
    for damaged in (bytes(changed), content[:-100], content[:3000], b"", b"plain text"):
        with open(path, "wb") as file:
            file.write(damaged)
        for on_bad_record in (None, [].append):
            with pytest.raises(ValueError, match="cannot read .*file.parquet as Parquet: ."):
                texts_of(path, on_bad_record=on_bad_record)
    with open(path, "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="file.parquet holds a Git LFS pointer"):
        texts_of(path)


def test_blocks_of_long_rows_are_small(tmp_path):
    texts = [str(i % 10) * 400_000 for i in range(100)]
    path = write(tmp_path / "file.parquet", pa.table({"text": texts}), use_dictionary=False)
    blocks = list(parquet_blocks(path, "text"))
    assert [text for block in blocks for text in block.texts()] == texts
    assert max(sum(map(len, block.texts())) for block in blocks) < 2_000_000


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": ["a"]}), file)
    assert texts_of(path) == ["a"]
