"""Config files and the flag `--config`; ConfigDicts end here."""

import dataclasses
import difflib
import inspect
import io
import os
import re
import runpy
import sys
import tokenize
import traceback
import typing
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from xlstm.dataset.config import STDLIB
from xlstm.files import check_inside, read_json
from xlstm.models.xlstm_parallel.config import check_sizes
from xlstm.tools.command_line import resolve_path
from xlstm.trainer.checkpoints.folder import CheckpointFolder
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.workdir import Workdir, with_new_fields
from xlstm.visible_text import short_repr

_CONFIGS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")


def sections() -> dict[str, type]:
    """The sections of a configuration and their dataclasses."""
    return typing.get_type_hints(RunConfig)


def default_config() -> ConfigDict:
    """Returns a configuration with every field at its default; unknown fields are refused."""
    config = ConfigDict(dataclasses.asdict(RunConfig()))
    return config.lock()


def to_run_config(config: ConfigDict) -> RunConfig:
    """Converts a configuration, once, to the frozen dataclasses that everything else takes.

    Args:
        config: A configuration made from `default_config`.

    Returns:
        The checked configuration.

    Raises:
        ValueError: If a section or field is unknown or missing, or a value cannot be.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    _check_names("the config", values, sections())
    made = {}
    for section, section_class in sections().items():
        fields = {field.name for field in dataclasses.fields(section_class)}
        _check_names(f"config.{section}", values[section], fields)
        hints = typing.get_type_hints(section_class)
        typed = {
            name: _typed(f"{section}.{name}", value, hints[name])
            for name, value in values[section].items()
        }
        made[section] = section_class(**typed)
    return RunConfig(**made)


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
        return to_run_config(values)
    except ValueError as error:
        raise ValueError(f"{workdir.config} is not the configuration of a run: {error}") from error


def _check_names(where: str, given: Any, known: typing.Collection[str]) -> None:
    if not isinstance(given, dict):
        listed = ", ".join(sorted(known))
        raise ValueError(f"{where}={short_repr(given)}: expected a section, with {listed}")
    unknown, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
    if unknown or missing:
        raise ValueError(
            f"{where} has the wrong fields (unknown: {', '.join(unknown) or 'none'}; missing:"
            f" {', '.join(missing) or 'none'}); begin with default_config()"
        )


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Brings a value to a field's type: an int where a float is wanted, a list for a tuple."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={short_repr(value)}: expected a tuple, such as ('a', 'b')")
        element = typing.get_args(hint)[0]
        return tuple(_typed(f"{name}[{index}]", x, element) for index, x in enumerate(value))
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}={short_repr(value)}: expected {hint.__name__}")
    return value


def check_field(name: str) -> None:
    """Raises ValueError, with the nearest name, if `section.field` is no field of a config."""
    known = [
        f"{section}.{field.name}"
        for section, section_class in sections().items()
        for field in dataclasses.fields(section_class)
    ]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "//xlstm/tools:show_config lists the fields"
        raise ValueError(f"config.{name}: there is no such field; {hint}")


def config_names() -> list[str]:
    """Names of the configs that come with the project."""
    names = [os.path.splitext(name) for name in os.listdir(_CONFIGS_DIR)]
    return sorted(stem for stem, ending in names if ending == ".py")


def config_path(name: str, base: str) -> str:
    """Finds a config file.

    Args:
        name: Name of a config that comes with the project, or a path; `:argument` may follow.
        base: The folder that relative paths start from.

    Returns:
        The absolute path, with the argument.

    Raises:
        ValueError: If there is no such config.
    """
    path, colon, argument = name.partition(":")
    if path in config_names():
        path = os.path.join(_CONFIGS_DIR, f"{path}.py")
    else:
        path = os.path.abspath(os.path.join(base, path))
        if not os.path.isfile(path):
            raise ValueError(
                f"--config={name}: there is no file {path}, and the configs by name are"
                f" {', '.join(config_names())}"
            )
    return path + colon + argument


def load_config(path: str) -> ConfigDict:
    """Runs a config file.

    Args:
        path: What `config_path` returned: a path, and perhaps `:argument`.

    Returns:
        What its `get_config` returned.

    Raises:
        ValueError: If the file or its `get_config` fails; in one sentence, with the place.
    """
    path, _, argument = path.partition(":")
    try:
        names = runpy.run_path(path)
        if "get_config" not in names:
            raise ValueError(f"the config file {path} has no function get_config")
        config = names["get_config"](*([argument] if argument else []))
    except ValueError:
        raise
    except Exception as error:  # Whatever a user's file may raise.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        place = f"{path}:{lines[files.index(path)]}" if path in files else path
        # A locked ConfigDict lists all its fields; the first and the last sentence say enough.
        text = re.sub(r" and cannot be added.*?}\"", ";", str(error), flags=re.S)
        text = text.replace("\\n", " ").replace("\\'", "'").strip("'\"")
        raise ValueError(f"{place}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config in {path} returned a {type(config).__name__}, not a ConfigDict;"
            " begin with default_config()"
        )
    return config


def field_comments(section_class: type) -> dict[str, str]:
    """The comments of a dataclass's fields: what stands behind `#`, until the next field."""
    source = inspect.getsource(section_class)
    names = {field.name for field in dataclasses.fields(section_class)}
    comments = {name: "" for name in names}
    field, line_start = None, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP and token.string == "@":
            field = None
        elif token.type == tokenize.NAME and line_start and token.string in names:
            field = token.string
        elif token.type == tokenize.NAME and line_start:
            field = None
        elif token.type == tokenize.COMMENT and field:
            comments[field] = f"{comments[field]} {token.string.lstrip('# ')}".strip()
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            line_start = True
        elif token.type != tokenize.COMMENT:
            line_start = False
    return comments


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
