"""Checks files of tasks before the harness reads them.

The harness skips a file that it cannot read, as if the task did not exist, and raises an error of
its own for a mistyped field or metric.
"""

import dataclasses
import difflib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.api import metrics  # noqa: F401  # Registers the metrics.
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.config.task import TaskConfig
from lm_eval.tasks._yaml_loader import load_yaml

_ENDING = ".yaml"
# Fields of a file besides those of `TaskConfig`.
_FILE_FIELDS = {"include"}


def check_task_files(folders: Iterable[str], tasks: Iterable[str]) -> None:
    """Checks the files of tasks that a command line names.

    Args:
        folders: The folders of `--include_path`.
        tasks: The tasks of `--tasks`; those that are not names of files are not checked.

    Raises:
        ValueError: If a folder does not exist, a file cannot be read, or a task has a field or a
            metric that does not exist.
    """
    paths = [Path(task) for task in tasks if task.endswith(_ENDING) and os.path.isfile(task)]
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"--include_path={folder}: expected a folder with files of tasks")
        paths += sorted(Path(folder).rglob(f"*{_ENDING}"))
    for path in paths:
        try:
            content = load_yaml(path, resolve_func=False)
        except Exception as error:  # A broken file, or one that it includes.
            raise ValueError(f"the task file {path} cannot be read: {error}") from error
        # Groups have other fields, and classes may have any.
        if isinstance(content.get("task"), str) and not {"group", "class"} & content.keys():
            _check_task(path, content)


def _check_task(path: Path, task: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TaskConfig)} | _FILE_FIELDS
    for name in task:
        if name not in known:
            raise ValueError(f"the task file {path} has a field {name!r}{_hint(str(name), known)}")
    for name in _metrics_by_name(task):
        if name not in METRIC_REGISTRY:
            hint = _hint(name, METRIC_REGISTRY.keys())
            raise ValueError(f"the task file {path} has a metric {name!r}{hint}")


def _metrics_by_name(task: dict[str, Any]) -> Iterator[str]:
    """Yields the metrics that the harness looks up in its registry alone."""
    if "process_results" in task:  # It computes them itself.
        return
    for metric in task.get("metric_list") or ():
        is_elsewhere = metric.get("hf_evaluate") or "aggregation" in metric
        name = metric.get("metric")
        # A function is the path of its file here.
        if isinstance(name, str) and os.sep not in name and not is_elsewhere:
            yield name


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ", which the harness does not know"
