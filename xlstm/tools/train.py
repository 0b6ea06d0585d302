"""Trains a language model: `bazel run //xlstm/tools:train -- --config=NAME --workdir=FOLDER`."""

import os

from absl import flags

from xlstm.tools.command_line import define_verify_data, resolve_path, run
from xlstm.tools.config import config_name, define_config_flag, run_config, with_config_paths
from xlstm.tools.processes import abort_all_on_failure, initialize_devices
from xlstm.trainer.llm.train import train_language_model

_CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; if it holds the run already, it goes on [runs/CONFIG]."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a run that began with another configuration."
)
_VERIFY_DATA = define_verify_data()


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config(_CONFIG)
    workdir = _WORKDIR.value or os.path.join("runs", config_name())
    initialize_devices()
    with abort_all_on_failure():
        train_language_model(
            config,
            resolve_path(workdir),
            allow_config_change=_ALLOW_CONFIG_CHANGE.value,
            verify_data=_VERIFY_DATA.value,
        )


if __name__ == "__main__":
    run(main, with_config_paths, outlives_output=True)
