"""The flag `--config`, and `--config.<section>.<field>` for every field."""

import os

from absl import flags
from ml_collections import config_flags

from xlstm.tools.config import config_path


def define_config_flag(default: str) -> flags.FlagHolder:
    """Defines the flag.

    Args:
        default: Name of the default config.

    Returns:
        The holder of the ConfigDict.
    """
    return config_flags.DEFINE_config_file(
        "config",
        config_path(default, ""),
        "A config by its name, or path[:argument] of a config file.",
        lock_config=True,
    )


def config_name() -> str:
    """The name of the chosen config: that of its file, without the ending."""
    path = flags.FLAGS["config"].config_filename
    return os.path.splitext(os.path.basename(path))[0]


def with_config_paths(words: list[str]) -> list[str]:
    """Replaces the name of a config, or a relative path, by the file's path.

    Args:
        words: The command line; the flag stands as `--config=NAME` or `--config NAME`.

    Returns:
        The command line for `config_flags`, which knows only paths.
    """
    base = os.environ.get("BUILD_WORKING_DIRECTORY", "")
    result = []
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config") and equals:
            word = f"{flag}={config_path(value, base)}"
        elif index and words[index - 1] in ("--config", "-config"):
            word = config_path(word, base)
        result.append(word)
    return result
