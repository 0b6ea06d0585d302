"""Trains a language model."""

from xlstm.common_types import TrainState
from xlstm.inference.generate import GenerationConfig, encode_prompt, generate_text
from xlstm.inference.loaded_model import LoadedModel, reshard_for_inference
from xlstm.inference.sampling import SamplingConfig
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.open_run import OpenRun, evaluated_params, open_run


def train_language_model(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
) -> None:
    """Trains from scratch, or goes on from the last checkpoint in the run's folder.

    SIGTERM and SIGINT end it early, after a checkpoint.

    Args:
        config: What to do.
        workdir_path: The run's folder; it is made if it is not there.
        allow_config_change: Whether to go on with a run that began with another configuration.
        verify_data: Whether to verify token stores first that are large, or were verified before.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data or the folder,
            or if training diverges, or ends in steps that are not sound.
        OSError: If something cannot be read or written.
    """
    num_steps = config.trainer.num_steps
    with open_run(
        config, workdir_path, allow_config_change=allow_config_change, verify_data=verify_data
    ) as run:
        state = run.fit(run.state, run.start_step, max(num_steps, run.start_step))
    step, confirmed = int(state.step), run.checkpointer.confirmed_step()
    is_confirmed = confirmed == step or not config.trainer.confirm_steps
    good = "none is yet" if confirmed is None else f"the last one is that of step {confirmed:,}"
    if step < num_steps:
        where = "there" if is_confirmed else f"the last confirmed checkpoint ({good})"
        run.say(
            f"stopped after step {step:,}, which is saved in {workdir_path}: the same command goes"
            f" on from {where}"
        )
        return
    if not is_confirmed:
        raise ValueError(
            f"{step:,} steps are done, but the last ones were not sound, and their checkpoint is"
            f" not confirmed ({good}): lower schedule.peak_lr or optimizer.grad_clip_norm, or name"
            " the checkpoint itself to use it as it is"
        )
    if config.logger.sample_tokens:
        run.say(f"{' a sample ':─^80}\n{_sample(config, run, state)}\n{'':─^80}")
    run.say(f"{step:,} steps done; everything lies in {workdir_path}")


def _sample(config: RunConfig, run: OpenRun, state: TrainState) -> str:
    """Text that the model writes, as `config.logger` says, up to the end of the document."""
    logger, tokenizer = config.logger, run.tokenizer
    params = reshard_for_inference(evaluated_params(state), run.mesh)
    model = LoadedModel(config.language_model, params, run.mesh, tokenizer)
    sampling = SamplingConfig(logger.sample_temperature, vocab_size=tokenizer.vocab_size)
    options = GenerationConfig(logger.sample_tokens, sampling, seed=config.trainer.seed)
    (written,), _ = generate_text(model, [encode_prompt(model, logger.sample_prompt)], options)
    return logger.sample_prompt + written.text
