"""The inputs of a run, opened and checked before anything but the built-in store is created."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from xlstm.dataset.data import Data, open_data
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.dataset.validation import ValidationSet, stores_of
from xlstm.distributed.pipeline_parallel import bubble_fraction
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import model_implementation
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
from xlstm.trainer.llm.workdir import Workdir, check_workdir, inherited_fields
from xlstm.trainer.logger.wandb_logger import check_wandb
from xlstm.visible_text import visible_lines


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run whose inputs are open and checked.

    Attributes:
        config: Configuration, with inherited fields and `decay_steps` filled in.
        mesh: Device mesh.
        workdir: Folder of the run.
        data: Training data.
        tokenizer: Tokenizer to write into the folder, see `choose_tokenizer`.
        validation_sets: Validation sets.
        stores: Token stores of the training data and of the validation sets.
        code: Version of the code, see `code_version`.
        console: Output of process 0; the other processes are quiet.
        clock: Clock of the run's phases.
        requests: Requests from this process to all, such as to stop.
        soundness: Judges whether steps are sound.
        source: Run folder and step of the checkpoint to take parameters from, which may be removed
            before it is read; None for random parameters, or if the run has checkpoints.
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
        """Prints a text in process 0; characters that control a terminal are made visible."""
        self.console.print(visible_lines(text), soft_wrap=True)

    def stop(self, signal_name: str) -> None:
        """Asks all processes to stop soon, and says so."""
        self.requests.ask(Request.STOP)
        self.say(stop_message(signal_name, *self.clock.activity()))

    @property
    def bubble_fraction(self) -> float:
        """The share of the blocks' time in which pipeline stages are idle."""
        stages = self.mesh.shape["pp"]
        return bubble_fraction(stages, self.config.mesh.count_microbatches(stages))


def prepare_run(config: RunConfig, workdir_path: str, allow_config_change: bool) -> PreparedRun:
    """Opens and checks the inputs of a run, before anything but the built-in store is created.

    Args:
        config: The run's configuration. A run that resumes keeps the defaults that it began with.
        workdir_path: The run's folder; it need not exist.
        allow_config_change: Whether the run may resume with another configuration.

    Returns:
        The run.

    Raises:
        ValueError: If the configuration is invalid, differs between processes, or does not fit the
            devices, the data or the folder.
        OSError: If something cannot be read, or the built-in store cannot be written.
    """
    # Configuration and folder.
    check_agreement("config", lambda: config_facts(config))
    clock, mesh, workdir = Clock(), create_run_mesh(config), Workdir(workdir_path)
    if config.logger.wandb and jax.process_index() == 0:
        check_wandb()
    inherited = inherited_fields(workdir, config)
    decay_steps_of_new_run = config.with_decay_steps().schedule.decay_steps
    config = config.with_fields(inherited).with_decay_steps()
    check_workdir(workdir, config, allow_config_change=allow_config_change)
    model_implementation(config.language_model, mesh.devices.flat[0])  # Raises if it cannot run.
    has_checkpoints = broadcast_from_process_0(CheckpointFolder(workdir.checkpoints).steps)
    init_from = "" if has_checkpoints else config.trainer.init_from
    source = find_checkpoint(init_from) if init_from else None

    # Data.
    data = open_data(config.data, workdir.stdlib_store)
    validation_sets = data.validation_sets()
    stores = [*data.stores, *stores_of(validation_sets)]
    check_agreement("data", lambda: data_facts(data, stores))
    check_vocabulary(config, data.tokenizer)
    if source:
        read_checkpoint(init_from, functools.partial(check_source, tokenizer=data.tokenizer))
    check_workdir(workdir, config, data.checksums, allow_config_change=allow_config_change)

    plain = {"highlight": False, "markup": False, "emoji": False}
    # mpirun gives process 0 a terminal of its own, whatever reads the output of mpirun.
    terminal = False if "OMPI_COMM_WORLD_RANK" in os.environ else None
    run = PreparedRun(
        config=config,
        mesh=mesh,
        workdir=workdir,
        data=data,
        tokenizer=choose_tokenizer(source[0] if source else workdir, data.tokenizer),
        validation_sets=validation_sets,
        stores=stores,
        code=code_version(),
        console=Console(quiet=jax.process_index() != 0, force_terminal=terminal, **plain),
        clock=clock,
        requests=Requests(mesh),
        soundness=Soundness(
            config.trainer.confirm_steps,
            config.trainer.max_loss_spike,
            config.trainer.max_update_ratio,
        ),
        source=source,
    )
    _report_inherited(run, inherited, decay_steps_of_new_run)
    return run


def _report_inherited(
    run: PreparedRun, inherited: dict[str, Any], decay_steps_of_new_run: int
) -> None:
    """Says which fields of its first configuration a run keeps."""
    defaults = dict(inherited)
    decay_steps = defaults.pop("schedule.decay_steps", None)
    if defaults:
        fields = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
        run.say(f"keeping the defaults that the run began with: {fields}")
    if decay_steps not in (None, decay_steps_of_new_run):
        run.say(
            f"keeping schedule.decay_steps={decay_steps} that the run began with; a new run of"
            f" trainer.num_steps={run.config.trainer.num_steps} would have"
            f" {decay_steps_of_new_run}"
        )
