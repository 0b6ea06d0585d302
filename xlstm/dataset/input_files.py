"""Finds the input files that paths, folders and patterns stand for, and tells their kinds."""

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
_REFUSED = {
    ".csv": "CSV is not read: convert it to Parquet, as with pandas.read_csv(...).to_parquet(...)",
    ".tsv": "TSV is not read: convert it to Parquet, as with "
    "pandas.read_csv(..., sep='\\t').to_parquet(...)",
    ".arrow": "Arrow files are not read: convert it to Parquet, as with "
    "datasets.Dataset.from_file(...).to_parquet(...)",
    ".feather": "Feather files are not read: convert it to Parquet, as with "
    "pandas.read_feather(...).to_parquet(...)",
}
# What Spark and its like write beside their data, apart from hidden files.
_MARKERS = re.compile(r"_SUCCESS|_(common_)?metadata|_(committed|started)_.*|_temporary")


def file_kind(path: str) -> str:
    """Returns what kind of file its name says it is.

    Args:
        path: The path of a file; it may have the ending of a compressed one, and be in any case.

    Returns:
        "text", "json_lines", "json" or "parquet".

    Raises:
        ValueError: It is of a kind that is not read; says what to do.
    """
    root, compression = split_compression(path)
    ending = os.path.splitext(root)[1].lower()
    if ending in _REFUSED:
        raise ValueError(f"{path}: {_REFUSED[ending]}")
    kind = _KINDS.get(ending, "text")
    if kind == "parquet" and compression:
        raise ValueError(
            f"{path}: Parquet is compressed within: decompress the file, or rename it to "
            f"{os.path.basename(root)} if it only has a wrong ending"
        )
    return kind


def find_files(inputs: Iterable[str]) -> list[str]:
    """Lists the files that the inputs stand for.

    Links are followed. Of several names of one file the first counts. Hidden files, and what Spark
    writes to mark its folders, are left out.

    Args:
        inputs: Absolute paths of files and folders, or glob patterns (`**` is any folders).

    Returns:
        Their absolute paths, in the order of the inputs, each input's own sorted, without doubles.

    Raises:
        ValueError: An input stands for no file, or for something that is not read.
        OSError: A folder cannot be read.
    """
    files: dict[object, str] = {}
    for pattern in inputs:
        found = [file for path in _matches(pattern) for file in sorted(_files_below(path))]
        if not found:
            hint = " (in a pattern, [[] stands for a bracket)" if "[" in pattern else ""
            raise ValueError(
                f"--input={pattern}: there is no such file, or none in that folder{hint}"
            )
        for path, real_path in found:
            files.setdefault(_identity(path, real_path), path)
    return list(files.values())


def _identity(path: str, real_path: str) -> object:
    """Returns what all names of a file have in common; raises ValueError unless it is read."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, a socket or a device: only files are read")
    file_kind(path)
    # Some network file systems number their files anew, but those have no hard links.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else real_path


def _matches(pattern: str) -> list[str]:
    """Returns the files and folders that a path or pattern stands for."""
    if os.path.lexists(pattern):
        return [pattern]
    parts = pattern.split(os.sep)
    if "**" not in parts:
        paths = glob.glob(pattern)
    else:  # `glob` would run in circles where links do.
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        top = os.sep.join(parts[:fixed]) or os.sep
        paths = [
            path
            for path, _ in _files_below(top)
            if _fits(os.path.relpath(path, top).split(os.sep), parts[fixed:])
        ]
    return [path for path in sorted(paths) if not _MARKERS.fullmatch(os.path.basename(path))]


def _fits(parts: list[str], patterns: list[str]) -> bool:
    """Returns whether a path, or a folder that it is in, matches the parts of a pattern."""
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
    """Yields a file, or the files in a folder, each with its real path."""
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
    """Returns what is in a folder, sorted, without hidden files and marks."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if names & {"dataset_info.json", "state.json"} and any(n.endswith(".arrow") for n in names):
        raise ValueError(
            f"{folder} is a saved dataset, which is not read: convert it to Parquet, as with "
            "datasets.load_from_disk(...).to_parquet(...)"
        )
    if "_delta_log" in names:
        raise ValueError(
            f"{folder} is a Delta table, whose files also hold removed rows: export it to Parquet"
        )
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and not _MARKERS.fullmatch(entry.name)
    ]
