"""The folder that a run owns."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlstm.dataset.tokenizer import (
    GENERATION_CONFIG_FILE,
    MARKERS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
)
from xlstm.files import check_inside, read_json, write_atomically
from xlstm.models.xlstm_parallel.config import check_sizes
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.multihost import broadcast_from_process_0, check_shared_folder
from xlstm.trainer.checkpoints.folder import CheckpointFolder
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig, create_schedule
from xlstm.visible_text import short_repr

# Sections, and fields as `section.field`, that may differ when a run resumes.
_FREE_TO_CHANGE = {
    "mesh",
    "backend.chunk_size",
    "backend.implementation",
    "logger",
    "data.validation_stores",
    *(f"trainer.{field.name}" for field in dataclasses.fields(TrainerConfig)),
} - {"trainer.seed", "trainer.init_from"}

# Former values of fields whose default has changed, or whose behavior was another one before the
# field existed. A run keeps the defaults that it began with, so the same command resumes it.
_FORMER_DEFAULTS = {
    "data.shuffle": "grain",
    "model.matmul_precision": "default",
    "optimizer.weight_decay_exclude": ("bias", "norm", "embeddings"),
}

# Schedules are compared step by step up to this number of steps.
_MAX_COMPARED_STEPS = 10**8


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths of the files and folders of a run."""

    path: str

    @property
    def config(self) -> str:
        """The resolved configuration."""
        return os.path.join(self.path, "config.json")

    @property
    def tokenizer(self) -> str:
        """The tokenizer's definition; the byte tokenizer has none."""
        return os.path.join(self.path, TOKENIZER_FILE)

    @property
    def tokenizer_config(self) -> str:
        """How `transformers` loads the tokenizer."""
        return os.path.join(self.path, TOKENIZER_CONFIG_FILE)

    @property
    def markers(self) -> str:
        """The markers of documents, for tokenizers with a definition."""
        return os.path.join(self.path, MARKERS_FILE)

    @property
    def generation_config(self) -> str:
        """Ids of special tokens and sampling defaults of a converted model."""
        return os.path.join(self.path, GENERATION_CONFIG_FILE)

    @property
    def metrics(self) -> str:
        """The metrics, one JSON object per line."""
        return os.path.join(self.path, "metrics.jsonl")

    @property
    def loss_plot(self) -> str:
        """The loss curves."""
        return os.path.join(self.path, "loss.png")

    @property
    def tensorboard(self) -> str:
        """The folder of the TensorBoard event files."""
        return os.path.join(self.path, "tensorboard")

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return os.path.join(self.path, "checkpoints")

    @property
    def bad_batches(self) -> str:
        """The folder of batches whose gradients were not finite."""
        return os.path.join(self.path, "bad_batches")

    @property
    def profile(self) -> str:
        """The folder of the profiler's traces."""
        return os.path.join(self.path, "profile")

    @property
    def stdlib_store(self) -> str:
        """The token store of the built-in corpus."""
        return os.path.join(self.path, "stdlib")


def plain_config(config: RunConfig) -> dict[str, Any]:
    """Returns a configuration as JSON represents it, with lists instead of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def run_info(
    config: RunConfig,
    corpora: list[str],
    tokenizer: Tokenizer | None,
    code: dict[str, str],
    mesh: Mapping[str, int],
) -> dict[str, Any]:
    """Returns what a checkpoint saves about the run that wrote it.

    Args:
        config: The run's configuration.
        corpora: Checksums of the training data; empty for a converted model.
        tokenizer: The tokenizer; None if it is not known.
        code: The version of the code, see `code_version`.
        mesh: The sizes of the mesh axes.

    Returns:
        A JSON object.
    """
    return {
        "config": plain_config(config),
        "corpora": corpora,
        "tokenizer": tokenizer and tokenizer.fingerprint,
        "code": code,
        "mesh": dict(mesh),
    }


def load_run_config(workdir: Workdir) -> RunConfig:
    """Reads the configuration of a run, without trusting it.

    Args:
        workdir: The run's folder.

    Returns:
        The configuration. Kernels that it demands of the device that trained are optional here.

    Raises:
        ValueError: If there is no valid configuration or no checkpoint, or if the model would be
            larger than the checkpoints.
    """
    check_inside(workdir.path, workdir.config)
    saved = read_json(workdir.config).get("config")
    try:
        if not isinstance(saved, dict):
            raise ValueError(f"config={short_repr(saved)}: expected an object with its sections")
        values = with_new_fields(saved)
        num_bytes = CheckpointFolder(workdir.checkpoints).num_bytes()
        if not num_bytes:
            raise ValueError("there is no checkpoint next to it")
        if isinstance(values["model"], dict):
            check_sizes(values["model"], num_bytes)  # Every parameter takes at least one byte.
        config = RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{workdir.config} is not the configuration of a run: {error}") from error
    if config.backend.implementation == "mosaic":
        config = config.with_fields({"backend.implementation": "auto"})
    return config


def with_new_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields that a saved configuration lacks, with the values that it implied.

    Those are their defaults, or the values in `_FORMER_DEFAULTS`.

    Args:
        saved: Fields by section, of this or an earlier version.

    Returns:
        The same with all fields of this version.
    """
    defaults = plain_config(RunConfig().with_fields(_FORMER_DEFAULTS))
    found = {section: saved.get(section, {}) for section in defaults}
    return saved | {
        section: defaults[section] | fields if isinstance(fields, dict) else fields
        for section, fields in found.items()
    }


def inherited_fields(workdir: Workdir, config: RunConfig) -> dict[str, Any]:
    """Returns the fields that a run inherits from the configuration that it began with.

    Args:
        workdir: The run's folder; it need not exist.
        config: The configuration to resume with.

    Returns:
        Values by `section.field`, the same in all processes: the former default of every field that
        has it in the folder, but today's default in `config`; and `schedule.decay_steps`, if
        `config` derives it from the length of the run.
    """

    def find() -> dict[str, Any]:
        try:
            saved, _ = _read_config(workdir)
        except (OSError, ValueError):
            return {}  # There is no run, or `check_workdir` reports what is wrong.
        default = RunConfig()
        configs = config, default, default.with_fields(_FORMER_DEFAULTS)
        before, (now, today, former) = _flatten(saved), map(_flatten, map(plain_config, configs))
        fields = {
            name: before[name]
            for name in _FORMER_DEFAULTS
            if before[name] == former[name] and now[name] == today[name]
        }
        decay_steps = before["schedule.decay_steps"]
        if not now["schedule.decay_steps"] and isinstance(decay_steps, int) and decay_steps > 0:
            fields["schedule.decay_steps"] = decay_steps
        return fields

    fields = broadcast_from_process_0(find)
    # Restores the tuples that JSON has turned into lists.
    return fields | {
        name: _FORMER_DEFAULTS[name] for name in fields.keys() & _FORMER_DEFAULTS.keys()
    }


def _read_config(workdir: Workdir) -> tuple[dict[str, Any], list[str]]:
    """Returns a run's saved configuration, with new fields, and the checksums of its data."""
    saved = read_json(workdir.config)
    try:
        config = with_new_fields(saved["config"])
        _flatten(config)
        return config, saved["corpora"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{workdir.config} is not the configuration of a run") from None


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{field}": value
        for section, fields in config.items()
        for field, value in fields.items()
    }


def check_workdir(
    workdir: Workdir,
    config: RunConfig,
    corpora: list[str] | None = None,
    *,
    allow_config_change: bool = False,
) -> None:
    """Checks that a folder is new, or belongs to a run that this configuration can resume.

    `_FREE_TO_CHANGE` may differ, and a schedule with the same learning rates for the steps done.

    Args:
        workdir: The folder.
        config: The run's configuration.
        corpora: Checksums of the training data; None leaves them unchecked.
        allow_config_change: Whether configuration and training data may differ.

    Raises:
        ValueError: If the folder belongs to a run with another configuration or other data, holds a
            run without a configuration or a model without a run, or if its checkpoints are a link
            that leads out of it.
    """
    # Tools reject a link that leads out of the folder. The folder itself may be a link.
    check_inside(workdir.path, workdir.checkpoints)
    if not os.path.exists(workdir.config):
        # An empty folder of checkpoints remains if the first start was killed early.
        if CheckpointFolder(workdir.checkpoints).steps() or os.path.exists(workdir.metrics):
            raise ValueError(
                f"{workdir.path} holds a run without its config.json: choose another --workdir"
            )
        return
    saved, saved_corpora = _read_config(workdir)
    before, now = _flatten(saved), _flatten(plain_config(config))
    if not saved_corpora:
        raise ValueError(
            f"{workdir.path} holds a converted model, and no run to resume: start one in another"
            " --workdir, with trainer.init_from set to that folder"
        )
    free = _FREE_TO_CHANGE
    if _same_so_far(workdir, saved, config):
        free = free | {"schedule"}
    differences = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not {name, name.split(".")[0]} & free
    ]
    if corpora is not None and saved_corpora != corpora:
        differences.append("the token stores hold other text")
    if differences and not allow_config_change:
        raise ValueError(
            f"{workdir.path} belongs to a run with another configuration"
            f" ({'; '.join(differences)}): choose another --workdir,"
            " or resume with --allow_config_change"
        )


def _same_so_far(workdir: Workdir, saved: dict[str, Any], config: RunConfig) -> bool:
    """Returns whether the steps done had the learning rates of the new configuration."""
    try:
        before = ScheduleConfig(**saved["schedule"])
    except (TypeError, KeyError, ValueError):
        return False
    if before == config.schedule:
        return True
    num_steps = max(CheckpointFolder(workdir.checkpoints).steps(), default=0)
    if num_steps > _MAX_COMPARED_STEPS:
        return False
    steps = np.arange(num_steps)
    rates = [create_schedule(schedule)(steps) for schedule in (before, config.schedule)]
    return bool(np.array_equal(*rates))


def write_config(workdir: Workdir, config: RunConfig, corpora: list[str]) -> None:
    """Writes a run's configuration, and the checksums of its training data, into its folder."""
    content = {"config": plain_config(config), "corpora": corpora}
    write_atomically(workdir.config, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def lock_workdir(workdir: Workdir) -> Iterator[None]:
    """Creates a run's folder, and locks it against other runs until the block or process ends.

    Args:
        workdir: The folder.

    Raises:
        OSError: In every process, if another run holds the lock, the folder cannot be created, or
            not all processes of this run see it.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            os.makedirs(workdir.path, exist_ok=True)
            folder = os.open(workdir.path, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"another process is training in {workdir.path}") from None

        broadcast_from_process_0(lock)
        check_shared_folder(workdir.path)
        yield
