"""The loggers of a run, created from its configuration."""

import os

import jax

from xlstm.trainer.llm.prepare_run import PreparedRun
from xlstm.trainer.llm.workdir import plain_config
from xlstm.trainer.logger.base_logger import Loggers
from xlstm.trainer.logger.jsonl import JsonLinesLogger
from xlstm.trainer.logger.loss_plot import LossPlotLogger
from xlstm.trainer.logger.tensorboard import TensorBoardLogger
from xlstm.trainer.logger.terminal import TerminalLogger
from xlstm.trainer.logger.wandb_logger import WandbLogger


def create_loggers(run: PreparedRun, start_step: int) -> Loggers:
    """Creates the loggers of a run; only process 0 has any.

    Args:
        run: The run.
        start_step: Number of steps already done.

    Returns:
        The loggers, as one.
    """
    if jax.process_index() != 0:
        return Loggers([])
    workdir, config = run.workdir, run.config
    first_step = start_step + 1 if start_step else 0  # A new run is evaluated before step 1.
    loggers = [
        JsonLinesLogger(workdir.metrics, first_step),
        LossPlotLogger(workdir.metrics, workdir.loss_plot),
        TerminalLogger(run.console, start_step, config.trainer.num_steps),
    ]
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(workdir.tensorboard, first_step))
    if config.logger.wandb:
        project, name = config.logger.wandb_project, os.path.basename(workdir.path)
        plain = plain_config(config)
        loggers.append(WandbLogger(workdir.path, project, name, plain, workdir.metrics))
    return Loggers(loggers)
