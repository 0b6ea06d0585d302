"""What the command-line tools share: how they start, how they fail, and where paths lie."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from xlstm.trainer.base.steady_output import make_steady
from xlstm.visible_text import visible


def resolve_path(path: str) -> str:
    """Returns the absolute path; a relative one starts where the user called `bazel run`."""
    return os.path.abspath(os.path.join(os.environ.get("BUILD_WORKING_DIRECTORY", ""), path))


def output_path(flag: str, value: str | None) -> str | None:
    """Resolves the path of a file to write at the end, so that a bad one is told at the start.

    Args:
        flag: The name of the flag.
        value: Its value; None or empty for no file.

    Returns:
        The absolute path, or the value if there is to be no file.

    Raises:
        ValueError: If it is a folder, or in a folder that does not exist.
    """
    path = value and resolve_path(value)
    if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path))):
        raise ValueError(f"--{flag}={value}: expected a file in a folder that exists")
    return path


def define_share(name: str, default: float, help_text: str) -> flags.FlagHolder[float]:
    """Defines a flag whose value is a share, from 0 to 1.

    Args:
        name: Its name.
        default: Its default.
        help_text: What it means.

    Returns:
        The holder of the value.
    """
    flag = flags.DEFINE_float(name, default, help_text)
    # The bounds that a float flag can have let NaN pass.
    flags.register_validator(name, lambda x: 0 <= x <= 1, "expected a share from 0 to 1")
    return flag


def define_verify_data() -> flags.FlagHolder[bool]:
    """Defines `--verify_data`, of tools that read token stores; returns the holder of its value."""
    return flags.DEFINE_bool(
        "verify_data",
        False,
        "Compare all token stores with their checksums before the first batch. Otherwise those of"
        " more than 64 MB are read beside it, and those that were verified on this machine not"
        " again.",
    )


def run(
    main: Callable[[list[str]], None],
    prepare_words: Callable[[list[str]], list[str]] = list,
    *,
    outlives_output: bool = False,
) -> None:
    """Runs a tool: parses its flags, and answers bad input in one line with exit status 2.

    Without a reader of its output it ends, without a word and with the status of others that do,
    unless it outlives that. An error that cannot be shown has its status all the same.

    Args:
        main: Takes the arguments that are no flags; ValueError and OSError are the user's business,
            any other exception is ours and shows its traceback.
        prepare_words: Changes the words of the command line before flags are parsed.
        outlives_output: Whether the tool goes on when its output cannot be written.
    """

    def guarded(argv: list[str]) -> None:
        _hide_late_writes()
        with _answering_errors():
            main(argv)
            sys.stdout.flush()

    def parse(argv: list[str]) -> list[str]:
        with _answering_errors():
            return flags.FLAGS([argv[0], *prepare_words(argv[1:])])

    _open_closed_streams()
    sys.stderr = make_steady(sys.stderr)
    if outlives_output:
        sys.stdout = make_steady(sys.stdout, _tell_of_loss)
    # Orbax tells much, and every error twice; --verbosity=0 shows it.
    logging.set_verbosity(logging.FATAL)
    app.run(guarded, flags_parser=parse)


def print_error(message: str) -> None:
    """Prints a message on one line of the standard error."""
    print_line(f"error: {message}")


def print_note(message: str) -> None:
    """Prints what the user should know on one line of the standard error."""
    print_line(f"note: {message}")


def print_line(text: str) -> None:
    """Prints a text, in which there may be parts of others' files, as one line of that."""
    print(visible(" ".join(text.split())), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _answering_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _end_without_reader()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # So Rich ends.
            _end_without_reader()
        raise
    except (flags.Error, ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print_error(message)
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_output()
    sys.exit(2)


def _tell_of_loss(reason: str) -> None:
    print(f"the standard output cannot be written ({reason}): going on without it", file=sys.stderr)


def _end_without_reader() -> None:
    _give_up_output()
    sys.exit(128 + signal.SIGPIPE)


def _give_up_output() -> None:
    """Lets what is left in Python's buffer go nowhere; written at its end it would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Puts the null device where a standard stream is closed.

    Else the next file that is opened would take its place, and what libraries write to the standard
    error would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _hide_late_writes() -> None:
    """Keeps TensorStore from a traceback for each write under way when a checkpoint failed."""

    def is_late_write(error: object) -> bool:
        return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

    def but_late_writes(hook: Callable, error_of: Callable) -> Callable:
        return lambda *args: None if is_late_write(error_of(*args)) else hook(*args)

    sys.excepthook = but_late_writes(sys.excepthook, lambda kind, error, trace: error)
    sys.unraisablehook = but_late_writes(sys.unraisablehook, lambda args: args.exc_value)
    threading.excepthook = but_late_writes(threading.excepthook, lambda args: args.exc_value)
