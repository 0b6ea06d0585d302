import os
import shutil

import pytest

from xlstm.dataset.input_files import file_kind, find_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*paths):
    for path in paths:
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(f"the text of {os.path.basename(path)!r}")


def found(*inputs):
    return [os.path.relpath(path) for path in find_files(map(os.path.abspath, inputs))]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".bz2", ".xz", ".GZ"])
@pytest.mark.parametrize(
    "ending, kind",
    [
        (".jsonl", "json_lines"),
        (".JSONL", "json_lines"),
        (".ndjson", "json_lines"),
        (".jsonlines", "json_lines"),
        (".json", "json"),
        (".txt", "text"),
        (".py", "text"),
        ("", "text"),
    ],
)
def test_file_kind(ending, kind, compression):
    assert file_kind(f"/a.json/c4-train.00000{ending}{compression}") == kind


def test_refused_kinds():
    assert file_kind("x.snappy.parquet") == file_kind("x.PARQUET") == "parquet"
    for name, message in {
        "x.csv": "x.csv: CSV is not supported: .*read_csv",
        "x.CSV.gz": "x.CSV.gz: CSV is not supported",
        "x.tsv": "TSV is not supported",
        "x.arrow": "x.arrow: Arrow files are not supported: .*to_parquet",
        "x.feather": "Feather files are not supported",
        "x.parquet.gz": "compressed Parquet files are not supported: .* rename it to x.parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            file_kind(name)


def test_find_files(folder):
    write("lines.jsonl", "books/b.txt", "books/a.txt", "books/.hidden", ".git/config")
    books = ["books/a.txt", "books/b.txt"]
    assert found("books") == books
    assert found(".") == [*books, "lines.jsonl"]
    assert found("lines.jsonl", "*/*.txt", "lines.jsonl") == ["lines.jsonl", *books]
    assert found("**/*.jsonl") == ["lines.jsonl"]
    assert found("books/.hidden") == ["books/.hidden"]
    (folder / "nothing").mkdir()
    for name in ("nothing", "missing", "*.csv"):
        with pytest.raises(ValueError, match="no such file, or a folder without files"):
            found(name)


def test_patterns_with_any_folders(folder):
    write("a.txt", "d/b.txt", "d/e/c.txt", "d/e/c.md", "d/f/g/h.txt", "d/f/.x/i.txt")
    assert found("**/*.txt") == ["a.txt", "d/b.txt", "d/e/c.txt", "d/f/g/h.txt"]
    assert found("d/**/*.txt") == ["d/b.txt", "d/e/c.txt", "d/f/g/h.txt"]
    assert found("*/**/?.md") == ["d/e/c.md"]
    assert found("d/**/g/**") == found("**/g") == ["d/f/g/h.txt"]
    assert found("d/**") == ["d/b.txt", "d/e/c.md", "d/e/c.txt", "d/f/g/h.txt"]


def test_the_order_is_that_of_the_inputs_and_of_names(folder):
    write("x/b.txt", "x/a.txt", "x.txt", "x/sub/a.txt", "w.txt")
    assert found("x.txt", "x", "w.txt") == ["x.txt", "x/a.txt", "x/b.txt", "x/sub/a.txt", "w.txt"]
    assert found("x*") == ["x/a.txt", "x/b.txt", "x/sub/a.txt", "x.txt"]


def test_linked_folders_and_files(folder):
    write("real/a.txt", "real/sub/b.txt", "in/c.txt")
    os.symlink("real", "link")
    os.symlink(os.path.abspath("real"), "in/linkdir")
    os.symlink(os.path.abspath("real/a.txt"), "in/linkfile.txt")
    os.symlink("../in", "in/loop")
    os.symlink("../in", "in/other_loop")
    os.symlink("..", "real/up")
    assert found("link") == ["link/a.txt", "link/sub/b.txt", "link/up/in/c.txt"]
    assert found("in/linkdir/a.txt") == ["in/linkdir/a.txt"]
    for inputs in (["in"], ["in/*"], ["in/**/*.txt"], ["in", "real", "link"]):
        names = found(*inputs)
        assert sorted(map(os.path.basename, map(os.path.realpath, names))) == [
            "a.txt",
            "b.txt",
            "c.txt",
        ]


def test_hard_links(folder):
    write("a.txt")
    os.link("a.txt", "b.txt")
    assert found(".") == ["a.txt"]
    assert found("b.txt", "a.txt") == ["b.txt"]


def test_what_is_no_file(folder):
    write("d/a.txt")
    os.symlink("/nowhere/b.txt", "d/b.txt")
    for name in ("d", "d/b.txt", "d/*", "**/*.txt"):
        with pytest.raises(ValueError, match="d/b.txt is a link to /nowhere/b.txt, which does"):
            found(name)
    os.remove("d/b.txt")
    os.mkfifo("d/c.txt")
    for name in ("d", "d/c.txt", "/dev/null"):
        with pytest.raises(ValueError, match="(d/c.txt|/dev/null) is a pipe, a socket or a device"):
            found(name)


def test_odd_names(folder):
    names = ["a,b/1.txt", "[x]/2.txt", "new\nline.txt", "sp ace.txt", os.fsdecode(b"caf\xe9.txt")]
    write(*names)
    assert found(".") == sorted(names)
    assert found("[x]") == ["[x]/2.txt"]
    assert found("[[]x]/*.txt") == ["[x]/2.txt"]
    with pytest.raises(ValueError, match=r"no such file.*write \[\[\] for a bracket"):
        found("[x]/*.txt")


def test_folders_of_spark(folder):
    write("d.jsonl/part-0.jsonl", "d.jsonl/x/part-1.jsonl", "d.jsonl/_SUCCESS")
    write("d.jsonl/.part-0.jsonl.crc", "d.jsonl/_committed_12", "d.jsonl/_temporary/0/part-0.jsonl")
    write("d.jsonl/_index.md")
    expected = ["d.jsonl/_index.md", "d.jsonl/part-0.jsonl", "d.jsonl/x/part-1.jsonl"]
    for name in ("d.jsonl", "d.jsonl/*", "d.jsonl/**"):
        assert found(name) == expected
    write("delta/_delta_log/0.json", "delta/part-0.parquet")
    with pytest.raises(ValueError, match="delta is a Delta table"):
        found("delta")


def test_saved_datasets(folder):
    for name in ("dataset_info.json", "state.json"):
        write(f"set/train/{name}", "set/train/data-00000-of-00001.arrow")
        with pytest.raises(ValueError, match="set/train is a saved dataset, .*load_from_disk"):
            found("set")
        with pytest.raises(ValueError, match="Arrow files are not supported"):
            found("set/train/*")
        shutil.rmtree("set")


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    write("d/locked/a.txt", "d/b.txt")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="locked"):
        found("d")
