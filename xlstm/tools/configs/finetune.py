"""Fine-tuning of the parameters of another run on new data: `--config=finetune:FOLDER`.

    bazel run //xlstm/tools:train -- --config=finetune:runs/mine --config.data.stores=data/mine

FOLDER is a run or one of its checkpoints (`runs/mine/checkpoints/500`). `//xlstm/tools:convert`
imports a model in the Hugging Face format as a run. Prepare the token stores with the model's
tokenizer, which is in the run's folder.
"""

import dataclasses

from xlstm.tools.command_line import resolve_path
from xlstm.tools.config import default_config
from xlstm.trainer.llm.find_checkpoint import split_checkpoint_path
from xlstm.trainer.llm.workdir import load_run_config


def get_config(path: str = ""):
    """Returns the configuration that fine-tunes the parameters of a run or checkpoint."""
    if not path:
        raise ValueError("--config=finetune: name the folder of a run, as --config=finetune:FOLDER")
    path = resolve_path(path)
    workdir, _ = split_checkpoint_path(path)
    source, config = load_run_config(workdir), default_config()
    config.model.update(dataclasses.asdict(source.model))  # The source's, as its parameters need.
    config.backend.update(dataclasses.asdict(source.backend))  # The source's.
    config.schedule.peak_lr = 1e-4  # Low, so that the model forgets little.
    config.schedule.warmup_steps = 50  # Until the optimizer's averages are good.
    config.trainer.init_from = path  # The source of the parameters.
    config.trainer.num_steps = 1000  # Few: a model soon overfits a small corpus.
    config.trainer.eval_interval = 100  # Often enough to see when overfitting starts.
    return config
