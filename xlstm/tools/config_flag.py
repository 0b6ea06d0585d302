"""The flag `--config`, and `--config.<section>.<field>` for every field."""

import dataclasses
import os

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from xlstm.dataset.config import STDLIB
from xlstm.tools.command_line import resolve_path
from xlstm.tools.config import check_field, config_path, load_config, to_run_config
from xlstm.trainer.llm.config import RunConfig

DEFAULT_CONFIG = "stdlib_tiny"
_FLAG = ("--config", "-config")


class _TupleParser(flags.ArgumentParser):
    """Reads a tuple from one flag, so that the last of several wins, as with every other field.

    `ml_collections` adds up the values of repeated flags wherever it sees its own parser.
    """

    def parse(self, argument: str | tuple) -> tuple:
        return tuple_parser.TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def define_config_flag() -> flags.FlagHolder:
    """Defines the flag.

    Returns:
        The holder of the ConfigDict.
    """
    # The default is put in by `with_config_paths`: one given here would be read, and its overrides
    # with it, before anyone can catch an error.
    return config_flags.DEFINE_config_file(
        "config",
        None,
        f"A config by its name, or path[:argument] of a config file [{DEFAULT_CONFIG}].",
        lock_config=True,
    )


def run_config(flag: flags.FlagHolder) -> RunConfig:
    """Reads the configuration that the flags choose.

    Args:
        flag: What `define_config_flag` returned.

    Returns:
        The checked configuration. Its paths are absolute: relative ones start where the user called
        `bazel run`.

    Raises:
        ValueError: If a value cannot be.
    """
    config = to_run_config(flag.value)
    data, init_from = config.data, config.trainer.init_from
    stores = tuple(name if name == STDLIB else resolve_path(name) for name in data.stores)
    validation_stores = tuple(
        f"{name}={resolve_path(path)}" for name, path in data.validation_paths.items()
    )
    data = dataclasses.replace(data, stores=stores, validation_stores=validation_stores)
    trainer = dataclasses.replace(config.trainer, init_from=init_from and resolve_path(init_from))
    return dataclasses.replace(config, data=data, trainer=trainer)


def config_name() -> str:
    """The name of the chosen config: that of its file, without the ending, and its argument."""
    path, _, argument = flags.FLAGS["config"].config_filename.partition(":")
    stem = os.path.splitext(os.path.basename(path))[0]
    # It is to be the name of a folder, and the argument may be a path.
    argument = argument.strip("./").replace("/", "_")
    return f"{stem}_{argument}" if argument else stem


def with_config_paths(words: list[str]) -> list[str]:
    """Replaces the name of a config, or a relative path, by the file's path.

    Args:
        words: The command line; the flag stands as `--config=NAME` or `--config NAME`.

    Returns:
        The command line for `config_flags`, which knows only paths.

    Raises:
        ValueError: If there is no such config, it does not load, or a `--config.<section>.<field>`
            is no field.
    """
    base = os.environ.get("BUILD_WORKING_DIRECTORY", "")
    result = []
    if not any(word.partition("=")[0] in _FLAG for word in words):
        words = [f"--config={DEFAULT_CONFIG}", *words]
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in _FLAG and equals:
            word = f"{flag}={_checked_path(value, base)}"
        elif flag.lstrip("-").startswith("config."):
            check_field(flag.lstrip("-").removeprefix("config."))
        elif index and words[index - 1] in _FLAG:
            word = _checked_path(word, base)
        result.append(word)
    return result


def _checked_path(name: str, base: str) -> str:
    # `config_flags` loads the file itself, but answers an error in it with a traceback.
    path = config_path(name, base)
    load_config(path)
    return path
