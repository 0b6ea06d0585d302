"""Trains a language model.

    bazel run //xlstm/tools:train -- --config=NAME --workdir=FOLDER

The same command resumes a run that was stopped.
"""

import os
import sys

from absl import flags

from xlstm.tools.command_line import (
    announce_start,
    define_verify_data,
    print_line,
    resolve_path,
    run,
)

if __name__ == "__main__":  # The other imports take seconds.
    announce_start("train: loading JAX and the model code ...", always=True)

from xlstm.common_types import TrainState
from xlstm.inference.generate import GenerationConfig, encode_prompt, generate_text
from xlstm.inference.loaded_model import LoadedModel, reshard_for_inference
from xlstm.inference.sampling import SamplingConfig
from xlstm.tools.config import config_name, define_config_flags, run_config
from xlstm.tools.processes import abort_all_on_failure, initialize_devices
from xlstm.trainer.llm.callbacks import evaluated_params
from xlstm.trainer.llm.train import TrainingRun, train_language_model

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run. If it holds the run already, training resumes. The default is runs/CONFIG.",
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resumes a run that began with another configuration."
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status when a signal has stopped the run before its last step. With another one than 0, a"
    " scheduler can tell a run to restart from a run that is done.",
    lower_bound=0,
    upper_bound=125,
)
_VERIFY_DATA = define_verify_data()


def sample_text(run: TrainingRun, state: TrainState) -> str:
    """Generates a text with a trained model, up to the end of a document.

    Args:
        run: The run; the `sample_...` fields of `config.logger` decide prompt and sampling.
        state: The state with the trained parameters.

    Returns:
        The prompt and its completion.
    """
    logger, tokenizer = run.config.logger, run.data.tokenizer
    params = reshard_for_inference(evaluated_params(state), run.mesh)
    model = LoadedModel(run.config.language_model, params, run.mesh, tokenizer)
    sampling = SamplingConfig(logger.sample_temperature, vocab_size=tokenizer.vocab_size)
    options = GenerationConfig(logger.sample_tokens, sampling, seed=run.config.trainer.seed)
    (completion,), _ = generate_text(model, [encode_prompt(model, logger.sample_prompt)], options)
    return logger.sample_prompt + completion.text


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config()
    workdir = resolve_path(_WORKDIR.value or os.path.join("runs", config_name()))
    print_line(f"train: starting the devices, for the run in {workdir} ...")
    initialize_devices()
    with abort_all_on_failure():
        is_done = train_language_model(
            config,
            workdir,
            allow_config_change=_ALLOW_CONFIG_CHANGE.value,
            verify_data=_VERIFY_DATA.value,
            sample=sample_text if config.logger.sample_tokens else None,
        )
    if not is_done:
        sys.exit(_STOPPED_STATUS.value)


if __name__ == "__main__":
    run(main, define_config_flags, outlives_output=True)
