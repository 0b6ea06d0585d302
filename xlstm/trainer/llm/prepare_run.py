"""Prepares a run: checks everything that can be checked before anything is made."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from rich.console import Console

from xlstm.dataset.data import Data, open_data
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.dataset.validation import ValidationSet, stores_of
from xlstm.distributed.pipeline_parallel import bubble_fraction
from xlstm.trainer.base.clock import Clock
from xlstm.trainer.base.coordinator import check_agreement
from xlstm.trainer.base.multihost import Request, Requests, broadcast_from_process_0
from xlstm.trainer.base.signals import stop_message
from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.checkpoints.folder import CheckpointFolder
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import check_vocabulary, create_run_mesh
from xlstm.trainer.llm.find_checkpoint import find_checkpoint, read_checkpoint
from xlstm.trainer.llm.language_model import check_source
from xlstm.trainer.llm.run_facts import code_version, config_facts, data_facts
from xlstm.trainer.llm.run_tokenizer import choose_tokenizer
from xlstm.trainer.llm.workdir import Workdir, check_workdir, kept_fields
from xlstm.trainer.logger.wandb_logger import check_wandb
from xlstm.visible_text import visible_lines


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """What is known of a run before its first step.

    Attributes:
        config: The configuration.
        mesh: The mesh.
        workdir: The run's folder.
        data: What it reads.
        tokenizer: What lies in the folder: that of the data, in the files that the model has.
        validation_sets: What it validates on.
        stores: All that both lie in.
        code: The version of the code that runs.
        console: Where the first process speaks.
        clock: What the time is spent on.
        requests: What this process asks of all.
        soundness: Judges the steps.
        source: The run and the step whose parameters it begins with, if they are still there then;
            None for random ones, and for a run that has begun.
    """

    config: RunConfig
    mesh: Mesh
    workdir: Workdir
    data: Data
    tokenizer: Tokenizer
    validation_sets: Sequence[ValidationSet]
    stores: Sequence[TokenStore]
    code: dict[str, str]
    console: Console
    clock: Clock
    requests: Requests
    soundness: Soundness
    source: tuple[Workdir, int] | None

    def say(self, text: str) -> None:
        """Shows a text as it is, but for characters that a terminal would obey."""
        self.console.print(visible_lines(text), soft_wrap=True)

    def stop(self, signal_name: str) -> None:
        """Asks all processes to stop."""
        self.requests.ask(Request.STOP)
        self.say(stop_message(signal_name, *self.clock.activity()))

    @property
    def bubble(self) -> float:
        """The share of time for which pipeline stages are idle."""
        stages = self.mesh.shape["pp"]
        return bubble_fraction(stages, self.config.mesh.count_microbatches(stages))


def prepare_run(config: RunConfig, workdir_path: str, allow_config_change: bool) -> PreparedRun:
    """Checks everything that can be checked before anything is made.

    Args:
        config: What to do; a run that goes on keeps the defaults that it began with.
        workdir_path: The run's folder; it need not be there.
        allow_config_change: Whether to go on with a run that began with another configuration.

    Returns:
        The run.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data, the folder or
            that of another process.
        OSError: If something cannot be read.
    """
    check_agreement("config", lambda: config_facts(config))
    clock, mesh, workdir = Clock(), create_run_mesh(config), Workdir(workdir_path)
    if config.logger.wandb and jax.process_index() == 0:
        check_wandb()
    kept = kept_fields(workdir, config)
    new_run, config = config.with_decay_steps(), config.with_fields(kept).with_decay_steps()
    check_workdir(workdir, config, allow_config_change=allow_config_change)
    has_begun = broadcast_from_process_0(CheckpointFolder(workdir.checkpoints).steps)
    init_from = "" if has_begun else config.trainer.init_from
    source = find_checkpoint(init_from) if init_from else None
    data = open_data(config.data, workdir.stdlib_store)
    validation_sets = data.validation_sets()
    stores = [*data.stores, *stores_of(validation_sets)]
    check_agreement("data", lambda: data_facts(data, stores))
    check_vocabulary(config, data.tokenizer)
    if source:
        read_checkpoint(init_from, functools.partial(check_source, tokenizer=data.tokenizer))
    check_workdir(workdir, config, data.checksums, allow_config_change=allow_config_change)
    options = {"highlight": False, "markup": False, "emoji": False}
    console = Console(quiet=jax.process_index() != 0, **options)
    run = PreparedRun(
        config=config,
        mesh=mesh,
        workdir=workdir,
        data=data,
        tokenizer=choose_tokenizer(source[0] if source else workdir, data.tokenizer),
        validation_sets=validation_sets,
        stores=stores,
        code=code_version(),
        console=console,
        clock=clock,
        requests=Requests(mesh),
        soundness=Soundness(
            config.trainer.confirm_steps,
            config.trainer.max_loss_spike,
            config.trainer.max_update_ratio,
        ),
        source=source,
    )
    decay_steps = kept.pop("schedule.decay_steps", None)
    if kept:
        fields = ", ".join(f"{name}={value!r}" for name, value in kept.items())
        run.say(f"keeping the defaults that the run began with: {fields}")
    if decay_steps not in (None, new_run.schedule.decay_steps):
        run.say(
            f"keeping schedule.decay_steps={decay_steps} that the run began with; a new run of"
            f" trainer.num_steps={config.trainer.num_steps} would have"
            f" {new_run.schedule.decay_steps}"
        )
    return run
