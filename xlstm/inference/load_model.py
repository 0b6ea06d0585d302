"""Loads a model from a checkpoint, for all that is not training."""

from xlstm.distributed.mesh import create_mesh
from xlstm.inference.loaded_model import LoadedModel, reshard_for_inference
from xlstm.trainer.checkpoints.read_params import read_fingerprint, read_params, read_run_info
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import check_model
from xlstm.trainer.llm.language_model import abstract_params
from xlstm.trainer.llm.run_tokenizer import read_eos_ids, read_tokenizer
from xlstm.trainer.llm.workdir import Workdir


def load_model(config: RunConfig, workdir: Workdir, step: int) -> LoadedModel:
    """Loads the model of a checkpoint: the moving average of its parameters, if it has one.

    Args:
        config: The run's configuration, with the mesh to load the model on.
        workdir: The run's folder.
        step: The checkpoint's step.

    Raises:
        ValueError: If the model does not fit on the mesh, or its tokenizer is missing or differs.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If the checkpoint cannot be read.
    """
    mesh = create_mesh(config.mesh)
    check_model(config.model, mesh)
    tokenizer = read_tokenizer(workdir, read_run_info(workdir.checkpoints, step))
    eos_ids = read_eos_ids(workdir, config.model.vocab_size)
    like, _ = abstract_params(config, mesh)
    params = reshard_for_inference(read_params(workdir.checkpoints, step, like), mesh)
    fingerprint = read_fingerprint(workdir.checkpoints, step)
    return LoadedModel(config.language_model, params, mesh, tokenizer, fingerprint, eos_ids)
