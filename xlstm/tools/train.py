"""Trains a language model: `bazel run //xlstm/tools:train -- --config=NAME --workdir=FOLDER`."""

import dataclasses
import os

from absl import flags

from xlstm.dataset.config import STDLIB
from xlstm.tools.command_line import resolve_path, run
from xlstm.tools.config import to_run_config
from xlstm.tools.config_flag import config_name, define_config_flag, with_config_paths
from xlstm.tools.processes import ending_together, initialize_devices
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.train import train_language_model

_CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; if it holds the run already, it goes on [runs/CONFIG]."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a run that began with another configuration."
)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    data, init_from = config.data, config.trainer.init_from
    stores = tuple(name if name == STDLIB else resolve_path(name) for name in data.stores)
    validation_stores = tuple(
        f"{name}={resolve_path(path)}" for name, path in data.validation_paths.items()
    )
    data = dataclasses.replace(data, stores=stores, validation_stores=validation_stores)
    trainer = dataclasses.replace(config.trainer, init_from=init_from and resolve_path(init_from))
    return dataclasses.replace(config, data=data, trainer=trainer)


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = _with_absolute_paths(to_run_config(_CONFIG.value))
    workdir = _WORKDIR.value or os.path.join("runs", config_name())
    initialize_devices()
    with ending_together():
        train_language_model(
            config, resolve_path(workdir), allow_config_change=_ALLOW_CONFIG_CHANGE.value
        )


if __name__ == "__main__":
    run(main, with_config_paths)
