"""Scores models with EleutherAI's lm-evaluation-harness: its command `lm_eval`, with our models.

    bazel run --config=eval //xlstm/tools:lm_eval -- --model=xlstm \
        --model_args=checkpoint=runs/mine --tasks=lambada_openai,hellaswag --batch_size=8

All arguments are the harness's own. `--model=xlstm` is the model of a run; `--model_args` takes
`checkpoint`, `add_bos_token`, `max_length`, `max_gen_toks` and sizes of mesh axes, such as `tp=2`.
"""

import os
import sys

from xlstm.tools.command_line import announce_start, run

_MISSING = (
    "lm_eval is not installed: give Bazel --config=eval, or run"
    " python3 -m pip install 'xlstm-lm[eval]'"
)


def main(argv: list[str]) -> None:
    """Runs the harness's command with the arguments, with the model class `xlstm` registered."""
    try:
        import jinja2
        import lm_eval.models  # noqa: F401  # Registers the harness's own models.
        import yaml
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ModuleNotFoundError as error:
        raise ValueError(_MISSING) from error
    import xlstm.tools.harness.model  # noqa: F401  # Registers ours.
    from xlstm.tools.harness.task_files import check_task_files

    # Paths in arguments and in the files of tasks start where the user called `bazel run`.
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    # Standard errors would be computed in forks of this process, which has JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    setup_logging()
    sys.argv = ["lm_eval", *argv[1:]]
    command = HarnessCLI()
    arguments = command.parse_args()
    folder, tasks = (getattr(arguments, name, None) for name in ("include_path", "tasks"))
    check_task_files([folder] if folder else [], tasks if isinstance(tasks, list) else [])
    try:
        command.execute(arguments)
    except (yaml.YAMLError, jinja2.TemplateError) as error:  # A task's file is wrong.
        raise ValueError(f"a task cannot be used: {error}") from error
    except ModuleNotFoundError as error:  # A model or a task needs more packages.
        raise ValueError(f"{error}: install it beside lm_eval") from error


if __name__ == "__main__":
    announce_start("lm_eval: loading JAX and the harness ...", always=True)
    # All flags are the harness's: absl must not see them.
    words, sys.argv[1:] = sys.argv[1:], []
    run(lambda argv: main([*argv, *words]))
