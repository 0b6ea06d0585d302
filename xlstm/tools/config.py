"""Config files and the flag `--config`.

A config file is a Python file with a function `get_config()`, or `get_config(argument)`, that
changes fields of `default_config()` and returns it. Only tools use ConfigDicts: all other packages
take the frozen dataclasses of `RunConfig`.
"""

import dataclasses
import difflib
import inspect
import io
import os
import re
import runpy
import tokenize
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from xlstm.tools.command_line import resolve_path
from xlstm.trainer.llm.config import RunConfig, sections

DEFAULT_CONFIG = "stdlib_tiny"
_CONFIGS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
_FLAG = ("--config", "-config")


def default_config() -> ConfigDict:
    """Returns a configuration with every field at its default; it rejects unknown fields."""
    config = ConfigDict(dataclasses.asdict(RunConfig()))
    return config.lock()


def to_run_config(config: ConfigDict) -> RunConfig:
    """Converts a configuration to the frozen dataclasses that all other packages take.

    Args:
        config: A configuration made from `default_config`.

    Returns:
        The checked configuration.

    Raises:
        ValueError: See `RunConfig.from_dict`.
    """
    return RunConfig.from_dict(config.to_dict() if isinstance(config, ConfigDict) else config)


def config_names() -> list[str]:
    """Returns the names of the configs that come with the project."""
    names = [os.path.splitext(name) for name in os.listdir(_CONFIGS_DIR)]
    return sorted(stem for stem, ending in names if ending == ".py")


def config_path(name: str) -> str:
    """Finds a config file.

    Args:
        name: Name of a config that comes with the project, or path of a config file, followed by
            `:argument` if it takes one. Relative paths start where the user called `bazel run`.

    Returns:
        The absolute path, followed by the argument.

    Raises:
        ValueError: If there is no such config.
    """
    path, colon, argument = name.partition(":")
    if path in config_names():
        path = os.path.join(_CONFIGS_DIR, f"{path}.py")
    else:
        given, path = path, resolve_path(path)
        if not os.path.isfile(path):
            near = difflib.get_close_matches(given, config_names(), n=1)
            hint = f"; did you mean --config={near[0]}?" if near else ""
            raise ValueError(
                f"--config={name}: there is no file {path}, and the configs by name are"
                f" {', '.join(config_names())}{hint}"
            )
    return path + colon + argument


def load_config(name: str) -> ConfigDict:
    """Runs a config file.

    Args:
        name: See `config_path`.

    Returns:
        The result of its `get_config`.

    Raises:
        ValueError: If there is no such file, or if it or its `get_config` fails; the error is one
            sentence with file and line.
    """
    path, _, argument = config_path(name).partition(":")
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
        location = f"{path}:{lines[files.index(path)]}" if path in files else path
        # The error of a locked ConfigDict lists all fields; keep its first and last sentence.
        text = re.sub(r" and cannot be added.*?}\"", ";", str(error), flags=re.S)
        text = text.replace("\\n", " ").replace("\\'", "'").strip("'\"")
        raise ValueError(f"{location}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config in {path} returned a {type(config).__name__}, not a ConfigDict;"
            " begin with default_config()"
        )
    return config


def field_comments(section_class: type) -> dict[str, str]:
    """Returns the comment of every field of a dataclass: the text after `#`, up to the next field.

    Args:
        section_class: The dataclass.

    Returns:
        Comments by the field's name; those on several lines are joined.
    """
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


class _TupleParser(flags.ArgumentParser):
    """Parser of a tuple in one flag: the last of repeated flags wins, as for all other fields.

    `ml_collections` would join the values of repeated flags if it saw its own parser.
    """

    def parse(self, argument: str | tuple) -> tuple:
        return tuple_parser.TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def define_config_flags(words: list[str]) -> list[str]:
    """Loads the config that a command line names, and defines a flag for each of its fields.

    Args:
        words: The command line, with `--config=NAME` or `--config NAME`.

    Returns:
        The command line without that flag. `--config.<section>.<field>` is now a flag.

    Raises:
        ValueError: If there is no such config, if it does not load, or if a
            `--config.<section>.<field>` names no field.
    """
    name, others = DEFAULT_CONFIG, []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag in _FLAG:
            name = value if equals else next(remaining, "")
            continue
        if flag.lstrip("-").startswith("config."):
            check_field(flag.lstrip("-").removeprefix("config."))
        others.append(word)
    config_flags.DEFINE_config_dict(
        "config",
        load_config(name),
        "Name of a config, or path[:argument] of a config file. Each of its fields is a flag, such"
        " as --config.mesh.tp=2; show_config lists them. The names are"
        f" {', '.join(config_names())}; the default is {DEFAULT_CONFIG}.",
        flag_values=flags.FLAGS,
        sys_argv=["", *others],
    )
    flags.FLAGS["config"].path = config_path(name)
    return others


def run_config() -> RunConfig:
    """Returns the configuration that the flags choose; call it after `define_config_flags`.

    Its paths are absolute: relative ones start where the user called `bazel run`.

    Raises:
        ValueError: If a value is invalid.
    """
    return to_run_config(flags.FLAGS["config"].value).resolve_paths(resolve_path)


def config_name() -> str:
    """Returns the name of the chosen config: its file's name without `.py`, and its argument."""
    path, _, argument = flags.FLAGS["config"].path.partition(":")
    stem = os.path.splitext(os.path.basename(path))[0]
    # The name becomes that of a folder, but the argument may be a path.
    argument = argument.strip("./").replace("/", "_")
    return f"{stem}_{argument}" if argument else stem


def check_field(name: str) -> None:
    """Raises ValueError, with the nearest name, if `name` is no `section.field` of a config."""
    known = [
        f"{section}.{field.name}"
        for section, section_class in sections().items()
        for field in dataclasses.fields(section_class)
    ]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "the tool show_config lists the fields"
        raise ValueError(f"config.{name}: there is no such field; {hint}")
