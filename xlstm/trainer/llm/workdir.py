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
from xlstm.trainer.base.multihost import broadcast_from_process_0, check_shared_folder
from xlstm.trainer.base.trainer import TrainerConfig
from xlstm.trainer.checkpoints.folder import CheckpointFolder
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig, create_schedule
from xlstm.visible_text import short_repr

# What may differ when a run goes on: sections, or fields as `section.field`.
_FREE_TO_CHANGE = {
    "mesh",
    "logger",
    "data.validation_stores",
    *(f"trainer.{field.name}" for field in dataclasses.fields(TrainerConfig)),
} - {"trainer.seed", "trainer.init_from"}

# Fields whose default is another one than it was, or than what there was before the field. A run
# keeps those that it began with, and goes on with the same command.
_FORMER_DEFAULTS = {
    "data.shuffle": "grain",
    "model.matmul_precision": "default",
    "optimizer.weight_decay_exclude": ("bias", "norm", "embeddings"),
}

# Of so many steps the learning rates can be compared one by one.
_MOST_COMPARED_STEPS = 10**8


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where everything of a run lies."""

    path: str

    @property
    def config(self) -> str:
        """The resolved configuration."""
        return os.path.join(self.path, "config.json")

    @property
    def tokenizer(self) -> str:
        """The tokenizer's definition, unless it is that of bytes."""
        return os.path.join(self.path, TOKENIZER_FILE)

    @property
    def tokenizer_config(self) -> str:
        """How other programs load it."""
        return os.path.join(self.path, TOKENIZER_CONFIG_FILE)

    @property
    def markers(self) -> str:
        """The markers around documents, for tokenizers that are files."""
        return os.path.join(self.path, MARKERS_FILE)

    @property
    def generation_config(self) -> str:
        """Ids of special tokens and sampling defaults of a model that came from elsewhere."""
        return os.path.join(self.path, GENERATION_CONFIG_FILE)

    @property
    def metrics(self) -> str:
        """The metrics, one JSON object a line."""
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
        """The folder of the batches whose gradients were not finite."""
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
    """The configuration as JSON gives it back: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def run_info(
    config: RunConfig,
    corpora: list[str],
    tokenizer: Tokenizer | None,
    code: dict[str, str],
    mesh: Mapping[str, int],
) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it.

    Args:
        config: The run's configuration.
        corpora: Checksums of what it trains on; none for a model that came from elsewhere.
        tokenizer: The tokenizer; None if it is not known.
        code: The version of the code.
        mesh: The sizes of the mesh's axes.

    Returns:
        What JSON can hold.
    """
    return {
        "config": plain_config(config),
        "corpora": corpora,
        "tokenizer": tokenizer and tokenizer.fingerprint,
        "code": code,
        "mesh": dict(mesh),
    }


def load_run_config(workdir: Workdir) -> RunConfig:
    """Reads the configuration of a run, which anyone may have made.

    Args:
        workdir: The run's folder.

    Returns:
        The configuration.

    Raises:
        ValueError: If there is none, or its model is larger than the run's checkpoints are.
    """
    check_inside(workdir.path, workdir.config)
    saved = read_json(workdir.config).get("config")
    try:
        if not isinstance(saved, dict):
            raise ValueError(f"config={short_repr(saved)}: expected its sections")
        values = with_new_fields(saved)
        num_bytes = CheckpointFolder(workdir.checkpoints).num_bytes()
        if not num_bytes:
            raise ValueError("there is no checkpoint beside it")
        if isinstance(values["model"], dict):
            check_sizes(values["model"], num_bytes)  # Every number has a byte, or several.
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{workdir.config} is not the configuration of a run: {error}") from error


def with_new_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds to a saved configuration the fields that are newer than it, with what there was before.

    That is their default, unless `_FORMER_DEFAULTS` says otherwise.
    """
    defaults = plain_config(RunConfig().with_fields(_FORMER_DEFAULTS))
    found = {section: saved.get(section, {}) for section in defaults}
    return saved | {
        section: defaults[section] | fields if isinstance(fields, dict) else fields
        for section, fields in found.items()
    }


def kept_fields(workdir: Workdir, config: RunConfig) -> dict[str, Any]:
    """Finds which fields of a configuration a run that resumes replaces by what it began with.

    Args:
        workdir: The run's folder; it need not exist.
        config: The configuration that it is to resume with.

    Returns:
        Values by `section.field`, the same in all processes: the former default of every field that
        has it in the folder and today's in `config`; and the end of the decay, if `config` leaves
        it to the length of the run.
    """

    def find() -> dict[str, Any]:
        try:
            saved, _ = _read_config(workdir)
        except (OSError, ValueError):
            return {}  # There is no run, or `check_workdir` says what is wrong.
        default = RunConfig()
        configs = config, default, default.with_fields(_FORMER_DEFAULTS)
        before, (now, today, former) = _flatten(saved), map(_flatten, map(plain_config, configs))
        kept = {
            name: before[name]
            for name in _FORMER_DEFAULTS
            if before[name] == former[name] and now[name] == today[name]
        }
        decay_steps = before["schedule.decay_steps"]
        if not now["schedule.decay_steps"] and isinstance(decay_steps, int) and decay_steps > 0:
            kept["schedule.decay_steps"] = decay_steps
        return kept

    kept = broadcast_from_process_0(find)
    return kept | {name: _FORMER_DEFAULTS[name] for name in kept.keys() & _FORMER_DEFAULTS.keys()}


def _read_config(workdir: Workdir) -> tuple[dict[str, Any], list[str]]:
    """Reads the configuration, with new fields, and the checksums of a run that has begun."""
    saved = read_json(workdir.config)
    try:
        config = with_new_fields(saved["config"])
        _flatten(config)
        return config, saved["corpora"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{workdir.config} is not a configuration of ours") from None


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
    """Checks that a folder is new or belongs to this very run.

    Args:
        workdir: The folder.
        config: The run's configuration.
        corpora: Checksums of what it trains on; None leaves them unchecked.
        allow_config_change: Whether the configuration and the corpora there may be others.

    Raises:
        ValueError: If the folder belongs to a run whose configuration or corpus differs in more
            than what may differ (`_FREE_TO_CHANGE`, and a schedule whose learning rates are the
            same for the steps done), holds a run without a configuration, or a model without
            a run, or if its checkpoints are a link to elsewhere.
    """
    # Tools would refuse to read elsewhere; a link to the whole folder of a run is none in it.
    check_inside(workdir.path, workdir.checkpoints)
    if not os.path.exists(workdir.config):
        # The folder of checkpoints may be there, if the first start was killed early.
        if CheckpointFolder(workdir.checkpoints).steps() or os.path.exists(workdir.metrics):
            raise ValueError(
                f"{workdir.path} holds a run without its config.json: choose another --workdir"
            )
        return
    saved, saved_corpora = _read_config(workdir)
    before, now = _flatten(saved), _flatten(plain_config(config))
    if not saved_corpora:
        raise ValueError(
            f"{workdir.path} holds a model that came from elsewhere, and no run that could go on:"
            " begin one in another --workdir with trainer.init_from set to that folder"
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
            " or go on with --allow_config_change"
        )


def _same_so_far(workdir: Workdir, saved: dict[str, Any], config: RunConfig) -> bool:
    """Whether the steps done had the learning rates that they would have now."""
    try:
        before = ScheduleConfig(**saved["schedule"])
    except (TypeError, KeyError, ValueError):
        return False
    if before == config.schedule:
        return True
    num_steps = max(CheckpointFolder(workdir.checkpoints).steps(), default=0)
    if num_steps > _MOST_COMPARED_STEPS:
        return False
    steps = np.arange(num_steps)
    rates = [create_schedule(schedule)(steps) for schedule in (before, config.schedule)]
    return bool(np.array_equal(*rates))


def write_config(workdir: Workdir, config: RunConfig, corpora: list[str]) -> None:
    """Writes a run's configuration, and checksums of what it trains on, into its folder."""
    content = {"config": plain_config(config), "corpora": corpora}
    write_atomically(workdir.config, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def own_workdir(workdir: Workdir) -> Iterator[None]:
    """Makes a run's folder, and keeps other runs out of it; the end of the process frees it too.

    Args:
        workdir: The folder.

    Raises:
        OSError: In every process, if another run has it, it cannot be made, or not all processes
            of this run see it.
    """
    with contextlib.ExitStack() as stack:

        def own() -> None:
            os.makedirs(workdir.path, exist_ok=True)
            folder = os.open(workdir.path, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"another process is training in {workdir.path}") from None

        broadcast_from_process_0(own)
        check_shared_folder(workdir.path)
        yield
