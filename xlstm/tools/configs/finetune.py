"""Trains on from the parameters of a run, on other data: `--config=finetune:FOLDER`.

`bazel run //xlstm/tools:train -- --config=finetune:runs/mine --config.data.stores=data/mine`
takes the model of a run, or of one of its checkpoints (`runs/mine/checkpoints/500`).
`//xlstm/tools:convert` imports a model in the Hugging Face format as such a folder. The token
stores must be prepared with the model's tokenizer, which is in that folder.
"""

import dataclasses

from xlstm.tools.command_line import resolve_path
from xlstm.tools.config import default_config
from xlstm.trainer.llm.find_checkpoint import split_checkpoint_path
from xlstm.trainer.llm.workdir import load_run_config


def get_config(path: str = ""):
    """Returns the configuration for the parameters in a folder."""
    if not path:
        raise ValueError("--config=finetune: name the folder of a run, as --config=finetune:FOLDER")
    path = resolve_path(path)
    workdir, _ = split_checkpoint_path(path)
    source, config = load_run_config(workdir), default_config()
    config.model.update(dataclasses.asdict(source.model))  # The same: its parameters are read.
    config.backend.update(dataclasses.asdict(source.backend))  # What the model is used to.
    config.schedule.peak_lr = 1e-4  # Low: what the model knows is to stay.
    config.schedule.warmup_steps = 50  # Until the optimizer has its averages.
    config.trainer.init_from = path  # The parameters.
    config.trainer.num_steps = 1000  # Small corpora are soon learned by heart.
    config.trainer.eval_interval = 100  # To see when that begins.
    return config
