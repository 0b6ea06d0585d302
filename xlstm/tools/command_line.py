"""Start, exit, help, paths and output of the command-line tools."""

import contextlib
import difflib
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from absl import app, flags, logging

from xlstm.installation import is_installed, tool_command
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.kernel_errors import kernel_problem
from xlstm.trainer.base.steady_output import make_steady
from xlstm.visible_text import visible

if TYPE_CHECKING:
    from rich.table import Table

_HELP_WORDS = ("help", "helpfull", "helpshort", "h", "?")
_WIDEST_HELP = 100
_ANY_WIDTH = 10_000
# How the help writes a flag's value.
_VALUES = {
    "string": "TEXT",
    "multi string": "TEXT",
    "int": "NUMBER",
    "float": "NUMBER",
    "comma separated list of strings": "A,B,...",
    "config object": "CONFIG",
}


def resolve_path(path: str) -> str:
    """Returns the absolute path; a relative one starts where the user called `bazel run`."""
    return os.path.abspath(os.path.join(os.environ.get("BUILD_WORKING_DIRECTORY", ""), path))


def output_path(flag: str, value: str | None) -> str | None:
    """Resolves the path of a file to write at the end, so that a bad one is reported at the start.

    Args:
        flag: The name of the flag.
        value: Its value; None or empty for no file.

    Returns:
        The absolute path, or `value` if no file is to be written.

    Raises:
        ValueError: If the path is a folder, or is in a folder that does not exist.
    """
    path = value and resolve_path(value)
    if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path))):
        raise ValueError(f"--{flag}={value}: expected a file in a folder that exists")
    return path


def define_share(name: str, default: float, help_text: str) -> flags.FlagHolder[float]:
    """Defines a flag whose value is a share, from 0 to 1.

    Args:
        name: The flag's name.
        default: Its default.
        help_text: What it means.

    Returns:
        The holder of the value.
    """
    flag = flags.DEFINE_float(name, default, help_text)
    # The bounds of a float flag let NaN pass.
    flags.register_validator(name, lambda x: 0 <= x <= 1, "expected a share from 0 to 1")
    return flag


def define_verify_data() -> flags.FlagHolder[bool]:
    """Defines `--verify_data`, of tools that read token stores; returns the value's holder."""
    return flags.DEFINE_bool(
        "verify_data",
        False,
        "Compares all token stores with their checksums before the first batch. By default, stores"
        " of more than 64 MB are verified in the background, and stores that were verified on this"
        " machine before are not verified again.",
    )


def announce_start(text: str, *, always: bool = False) -> None:
    """Prints a line before the slow imports of a tool, and lets Ctrl-C end them quietly.

    Call it from a tool's module, between the imports, if that module is the program.

    Args:
        text: What the tool does now.
        always: Whether to print it to files and pipes too, and not only to a terminal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `run` restores it.
    if sys.stderr is not None and (always or sys.stderr.isatty()):
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())


def run(
    main: Callable[[list[str]], None],
    prepare_words: Callable[[list[str]], list[str]] = list,
    *,
    outlives_output: bool = False,
) -> None:
    """Runs a tool: parses its flags, and answers bad input with one line and exit status 2.

    When the reader of its output ends, the tool ends without a message, with the status that other
    programs have then, unless it outlives its output. If an error cannot be shown, the exit status
    still reports it.

    Args:
        main: Takes the arguments that are not flags. ValueError and OSError report bad input, and
            so do errors of the mLSTM's kernels; any other exception is a bug and shows its
            traceback.
        prepare_words: Changes the words of the command line before flags are parsed.
        outlives_output: Whether the tool continues when its output cannot be written.
    """

    def guarded(argv: list[str]) -> None:
        silence_late_tensorstore_errors()
        with _answering_errors():
            main(argv)
            sys.stdout.flush()

    def parse(argv: list[str]) -> list[str]:
        with _answering_errors():
            if _asks_for_help(argv[1:]):
                prepare_words([])  # It may define flags.
                print(help_text((sys.modules["__main__"].__doc__ or "").strip()), flush=True)
                sys.exit(0)
            return flags.FLAGS([argv[0], *prepare_words(argv[1:])])

    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # See `announce_start`.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = make_steady(sys.stderr)
    if outlives_output:
        sys.stdout = make_steady(sys.stdout, _report_loss)
    # Orbax logs a lot, and every error twice; --verbosity=0 shows it.
    logging.set_verbosity(logging.FATAL)
    app.run(guarded, flags_parser=parse)


def project_flags() -> list[flags.Flag]:
    """Returns the flags of the running tool that this project defines, the tool's own first."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = [module for module in by_module if module == sys.argv[0]]
    others = sorted(module for module in by_module if module.startswith("xlstm."))
    return [flag for module in (*own, *others) for flag in by_module[module]]


def help_text(description: str) -> str:
    """Returns the help of the running tool: its description, and all flags of this project.

    Args:
        description: What the tool does and how to call it.
    """
    width = min(shutil.get_terminal_size((_WIDEST_HELP, 24)).columns, _WIDEST_HELP)
    indented = textwrap.TextWrapper(width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    parts = [_as_installed(description), "", "Flags:"]
    for flag in project_flags():
        text = " ".join((flag.help or "").split())
        # absl puts the values of an enum in front, which the usage shows already.
        parts += [f"  {_flag_usage(flag)}", indented.fill(re.sub(r"^<\S*>: ", "", text))]
    return "\n".join(parts)


def _as_installed(text: str) -> str:
    """Replaces Bazel's commands in a text where others start the tools."""
    return re.sub(
        r"bazel run (--config=\w+ )?//xlstm/tools:(\w+)( --)?",
        lambda found: tool_command(found[2]) if is_installed() else found[0],
        text,
    )


def _flag_usage(flag: flags.Flag) -> str:
    """Returns how to write a flag, and its default if it has one."""
    if isinstance(flag, flags.BooleanFlag):
        return f"--[no]{flag.name}"
    values = getattr(flag.parser, "enum_values", None)
    kind = "|".join(values) if values else _VALUES.get(flag.flag_type(), "VALUE")
    default = flag.default
    default = ",".join(map(str, default)) if isinstance(default, list) else default
    # Shows short defaults only, not that of a configuration.
    has_default = isinstance(default, (str, int, float)) and default != ""
    return f"--{flag.name}={kind}" + (f" (default: {default})" if has_default else "")


def _asks_for_help(words: list[str]) -> bool:
    words = words[: words.index("--")] if "--" in words else words
    return any(word[:1] == "-" and word.lstrip("-") in _HELP_WORDS for word in words)


def print_table(table: "Table") -> None:
    """Prints a table: within the width of a terminal, and with whole lines in a file or a pipe.

    Args:
        table: A table of Rich, whose texts are shown as they are.
    """
    from rich.console import Console  # Imported here, since the first line must not wait for it.

    width = None if sys.stdout.isatty() else _ANY_WIDTH
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_error(message: str) -> None:
    """Prints an error message on one line of the standard error."""
    print_line(f"error: {message}")


def print_note(message: str) -> None:
    """Prints something the user should know on one line of the standard error."""
    print_line(f"note: {message}")


def print_line(text: str) -> None:
    """Prints a text on one line of the standard error; it may quote other people's files."""
    print(visible(" ".join(text.split())), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _answering_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _end_without_reader()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Rich exits like this.
            _end_without_reader()
        raise
    except flags.UnrecognizedFlagError as error:
        _fail(_unknown_flag(error.flagname))
    except Exception as error:
        if problem := kernel_problem(error):
            _fail(problem)
        if not isinstance(error, (flags.Error, ValueError, OSError)):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _unknown_flag(name: str) -> str:
    """Returns the message about a flag that does not exist, with the one that may be meant."""
    names = [flag.name for flag in project_flags()]
    near = _config_fields(name) or difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "see --help"
    return f"there is no flag --{name}; {hint}"


def _config_fields(name: str) -> list[str]:
    """Returns the flags of the configuration's fields with a name, whatever their section."""
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if not config:
        return []
    return [f"config.{section}.{name}" for section in config if name in config[section]]


def _fail(message: str) -> None:
    print_error(message)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    sys.exit(2)


def _report_loss(reason: str) -> None:
    print(
        f"the standard output cannot be written ({reason}): continuing without it", file=sys.stderr
    )


def _end_without_reader() -> None:
    _discard_output()
    sys.exit(128 + signal.SIGPIPE)


def _discard_output() -> None:
    """Discards what is left in Python's buffer, which would fail again when written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Opens the null device in place of each closed standard stream.

    Otherwise the next file that is opened would take its place, and what libraries write to the
    standard error would end up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def silence_late_tensorstore_errors() -> None:
    """Hides the traceback that TensorStore prints for each write that outlives its checkpoint."""

    def is_late_error(error: object) -> bool:
        return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

    def silenced(hook: Callable, error_of: Callable) -> Callable:
        return lambda *args: None if is_late_error(error_of(*args)) else hook(*args)

    sys.excepthook = silenced(sys.excepthook, lambda kind, error, trace: error)
    sys.unraisablehook = silenced(sys.unraisablehook, lambda args: args.exc_value)
    threading.excepthook = silenced(threading.excepthook, lambda args: args.exc_value)
