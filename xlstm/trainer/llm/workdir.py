"""The folder that a run owns."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
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
from xlstm.trainer.base.multihost import broadcast_from_process_0, check_shared_folder
from xlstm.trainer.base.trainer import TrainerConfig
from xlstm.trainer.checkpoints.folder import CheckpointFolder, confirmed_step, parse_step
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig, create_schedule

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


def split_checkpoint_path(path: str) -> tuple[Workdir, int | None]:
    """The run and the step that the folder of a run, or of one of its checkpoints, stands for.

    Args:
        path: The folder; it need not be there.

    Returns:
        The run's folder, and the step; None if it is not that of a checkpoint.
    """
    if os.path.isdir(Workdir(path).checkpoints):  # A run, whatever its name.
        return Workdir(path), None
    parent, name = os.path.split(os.path.normpath(path))
    step = parse_step(name)
    if step is not None and os.path.basename(parent) == "checkpoints":
        return Workdir(os.path.dirname(parent)), step
    return Workdir(path), None


def find_checkpoint(
    path: str, report: Callable[[str], None] = lambda text: None
) -> tuple[Workdir, int]:
    """Finds a checkpoint by the folder of its run, or its own.

    Args:
        path: The folder. For that of a run it is the last checkpoint that is confirmed.
        report: Takes a line about a newer one that is not.

    Returns:
        The run's folder and the step.

    Raises:
        ValueError: If there is none, or it is a link that leads out of the run's folder.
    """
    workdir, wanted = split_checkpoint_path(path)
    folder = CheckpointFolder(workdir.checkpoints)

    def find() -> tuple[list[int], int | None]:
        saved = folder.metadata()
        return list(saved), confirmed_step(saved)

    # The run may be going on: all processes must choose the same.
    steps, confirmed = broadcast_from_process_0(find)
    if wanted is None and steps:
        newest, wanted = max(steps), confirmed
        unsure = f"{folder.step_dir(newest)} is not confirmed, since steps before it were not sound"
        if confirmed is None:
            raise ValueError(
                f"{path}: there is no confirmed checkpoint. {unsure}: name it to use it as it is"
            )
        if newest != confirmed:
            report(f"{unsure}: the checkpoint of step {confirmed} is used")
    if wanted not in steps:
        raise ValueError(f"{path}: there is no whole checkpoint of a run")
    checkpoint = CheckpointFolder(workdir.checkpoints).step_dir(wanted)
    for used in (workdir.config, workdir.tokenizer, checkpoint):
        check_inside(workdir.path, used)
    return workdir, wanted


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


def with_new_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds to a saved configuration the fields that are newer than it, with what there was before.

    That is their default, unless `_FORMER_DEFAULTS` says otherwise.
    """
    defaults = plain_config(with_fields(RunConfig(), _FORMER_DEFAULTS))
    found = {section: saved.get(section, {}) for section in defaults}
    return saved | {
        section: defaults[section] | fields if isinstance(fields, dict) else fields
        for section, fields in found.items()
    }


def with_fields(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """Returns a configuration with other values of some fields, named `section.field`."""
    for name, value in fields.items():
        section, field = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def kept_defaults(workdir: Workdir, config: RunConfig) -> dict[str, Any]:
    """Finds what a run that goes on keeps of the defaults that it began with.

    Args:
        workdir: The run's folder; it need not be there.
        config: The configuration that it is to go on with.

    Returns:
        The former default of every field, as `section.field`, that has it in the folder and today's
        in `config`; the same in all processes.
    """

    def find_names() -> list[str]:
        try:
            saved, _ = _read_config(workdir)
        except (OSError, ValueError):
            return []  # There is no run, or `check_workdir` says what is wrong.
        default = RunConfig()
        configs = config, default, with_fields(default, _FORMER_DEFAULTS)
        before, (now, today, former) = _flatten(saved), map(_flatten, map(plain_config, configs))
        return [
            name
            for name in _FORMER_DEFAULTS
            if before[name] == former[name] and now[name] == today[name]
        ]

    return {name: _FORMER_DEFAULTS[name] for name in broadcast_from_process_0(find_names)}


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
