import bz2
import gzip
import lzma

import pyarrow
import pytest

from xlstm.dataset.compressed_file import CompressedFile, split_compression

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
TEXT = b"".join(b"line %d of the text\n" % i for i in range(40_000))


def content_of(path, size=1 << 16):
    with CompressedFile(str(path)) as file:
        return b"".join(iter(lambda: file.read(size), b""))


@pytest.fixture(params=COMPRESS)
def ending(request):
    return request.param


def test_split_compression():
    assert split_compression("/a.b/c.jsonl.GZ") == ("/a.b/c.jsonl", ".gz")
    assert split_compression("c.zst") == ("c", ".zst")
    assert split_compression("c.jsonl") == ("c.jsonl", "")


@pytest.mark.parametrize("size", [1000, 1 << 20, 1 << 25])
def test_whole_content(tmp_path, ending, size):
    path = tmp_path / f"file{ending}"
    path.write_bytes(COMPRESS[ending](TEXT))
    assert content_of(path, size) == TEXT
    with CompressedFile(str(path)) as file:
        assert len(file.read(12_345)) == 12_345
        assert 0 < file.position <= path.stat().st_size
        assert file.read_all() == TEXT[12_345:]
        assert file.position == path.stat().st_size


def test_a_file_that_is_not_compressed(tmp_path):
    (tmp_path / "file.txt").write_bytes(TEXT)
    assert content_of(tmp_path / "file.txt") == TEXT


def test_members_behind_one_another(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    compress = COMPRESS[ending]
    path.write_bytes(compress(TEXT) + compress(b"") + compress(b"the end"))
    assert content_of(path) == TEXT + b"the end"


def test_every_truncation_is_an_error(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    one = COMPRESS[ending](b"some text, some text")
    whole = one + one
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size == len(one):  # A cut between members is invisible.
            assert content_of(path) == b"some text, some text"
        else:
            with pytest.raises(ValueError, match="file.* is not a complete .* file: "):
                content_of(path)


def test_something_else_behind(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    path.write_bytes(COMPRESS[ending](TEXT) + b"garbage")
    with pytest.raises(ValueError, match="file.* is not a complete .* file: "):
        content_of(path)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_padding(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    one = COMPRESS[ending](b"text")
    path.write_bytes(one + b"\0" * 512 + one + b"\0" * 200_000)
    assert content_of(path) == b"texttext"


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_changed_bytes(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    data = bytearray(COMPRESS[ending](TEXT))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="file.* is not a complete .* file: "):
        content_of(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it holds nothing"),
        (b"plain text", "it holds b'plain text'"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", "it holds a Git LFS pointer"),
        (b"PAR1\x15\x04", "it holds Parquet data"),
    ],
)
def test_a_wrong_ending(tmp_path, ending, content, message):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file{ending} is not a complete .* file: {message}"):
        content_of(path)


def test_frames_of_zstd_to_skip(tmp_path):
    path = tmp_path / "file.zst"
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    path.write_bytes(skipped + COMPRESS[".zst"](b"text") + skipped)
    assert content_of(path) == b"text"


def test_a_zstd_window_that_is_too_large(tmp_path):
    # The header of a frame with a window of 2 GiB, as `zstd --long=31` writes it, and no content.
    path = tmp_path / "file.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00")
    with pytest.raises(ValueError, match="file.zst is compressed with a window of more than 128"):
        content_of(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="missing.gz"):
        content_of(tmp_path / "missing.gz")
