"""Input files: expansion of paths, folders and patterns, and the kind of each file."""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator

from xlstm.dataset.compressed_file import split_compression

_KINDS = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".jsonlines": "json_lines",
    ".json": "json",
    ".parquet": "parquet",
}
_UNSUPPORTED = {
    ".csv": "CSV is not supported: convert it to Parquet, for example with "
    "pandas.read_csv(...).to_parquet(...)",
    ".tsv": "TSV is not supported: convert it to Parquet, for example with "
    "pandas.read_csv(..., sep='\\t').to_parquet(...)",
    ".arrow": "Arrow files are not supported: convert it to Parquet, for example with "
    "datasets.Dataset.from_file(...).to_parquet(...)",
    ".feather": "Feather files are not supported: convert it to Parquet, for example with "
    "pandas.read_feather(...).to_parquet(...)",
}
# Files that Spark and similar systems write next to their data, apart from hidden ones.
_MARKERS = re.compile(r"_SUCCESS|_(common_)?metadata|_(committed|started)_.*|_temporary")


def file_kind(path: str) -> str:
    """Returns the kind of a file by its extension.

    Args:
        path: The path of a file, perhaps with the extension of a compressed one, in any case.

    Returns:
        "text", "json_lines", "json" or "parquet".

    Raises:
        ValueError: The kind is not supported; the message says what to do.
    """
    root, compression = split_compression(path)
    extension = os.path.splitext(root)[1].lower()
    if extension in _UNSUPPORTED:
        raise ValueError(f"{path}: {_UNSUPPORTED[extension]}")
    kind = _KINDS.get(extension, "text")
    if kind == "parquet" and compression:
        raise ValueError(
            f"{path}: compressed Parquet files are not supported: decompress the file, or"
            f" rename it to {os.path.basename(root)} if only its extension is wrong"
        )
    return kind


def find_files(inputs: Iterable[str]) -> list[str]:
    """Lists the files that the inputs match.

    Links are followed. A file with several names is listed once, by the first. Hidden files, and
    the marker files of Spark, are skipped.

    Args:
        inputs: Absolute paths of files and folders, or glob patterns (`**` matches any folders).

    Returns:
        The absolute paths of the files, in the order of the inputs and sorted within each input,
        without duplicates.

    Raises:
        ValueError: An input matches no file, or something that is not supported.
        OSError: A folder cannot be read.
    """
    files: dict[object, str] = {}
    for pattern in inputs:
        found = [file for path in _matches(pattern) for file in sorted(_files_below(path))]
        if not found:
            hint = " (in a pattern, write [[] for a bracket)" if "[" in pattern else ""
            raise ValueError(f"--input={pattern}: no such file, or a folder without files{hint}")
        for path, real_path in found:
            files.setdefault(_identity(path, real_path), path)
    return list(files.values())


def _identity(path: str, real_path: str) -> object:
    """Returns what all names of a file share; raises ValueError if it is not supported."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, which does not exist"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, a socket or a device: expected a regular file")
    file_kind(path)
    # Some network file systems change inode numbers, but they have no hard links.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else real_path


def _matches(pattern: str) -> list[str]:
    """Returns the files and folders that a path or pattern matches."""
    if os.path.lexists(pattern):
        return [pattern]
    parts = pattern.split(os.sep)
    if "**" not in parts:
        paths = glob.glob(pattern)
    else:  # `glob` would follow cyclic links.
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        top = os.sep.join(parts[:fixed]) or os.sep
        paths = [
            path
            for path, _ in _files_below(top)
            if _fits(os.path.relpath(path, top).split(os.sep), parts[fixed:])
        ]
    return [path for path in sorted(paths) if not _MARKERS.fullmatch(os.path.basename(path))]


def _fits(parts: list[str], patterns: list[str]) -> bool:
    """Returns whether a path, or one of its parent folders, matches the parts of a pattern."""
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_fits(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], patterns[0])
        and _fits(parts[1:], patterns[1:])
    )


def _files_below(path: str) -> Iterator[tuple[str, str]]:
    """Yields a file, or all files below a folder, each with its real path."""
    if not os.path.isdir(path):
        yield path, os.path.realpath(path)
        return
    pending, visited = [path], set()
    while pending:
        folder = pending.pop()
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            continue
        visited.add(real_folder)
        entries = _entries(folder)
        for entry in entries:
            if not entry.is_dir():
                real_path = os.path.join(real_folder, entry.name)
                yield entry.path, os.path.realpath(entry.path) if entry.is_symlink() else real_path
        pending += [entry.path for entry in reversed(entries) if entry.is_dir()]


def _entries(folder: str) -> list[os.DirEntry]:
    """Returns the entries of a folder, sorted, without hidden and marker files."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if names & {"dataset_info.json", "state.json"} and any(n.endswith(".arrow") for n in names):
        raise ValueError(
            f"{folder} is a saved dataset, which is not supported: convert it to Parquet, for"
            " example with datasets.load_from_disk(...).to_parquet(...)"
        )
    if "_delta_log" in names:
        raise ValueError(
            f"{folder} is a Delta table, whose files include removed rows: export it to Parquet"
        )
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and not _MARKERS.fullmatch(entry.name)
    ]
