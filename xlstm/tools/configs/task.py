"""Synthetic tasks that compare mLSTM and sLSTM blocks: `--config=task:parity`.

    bazel run //xlstm/tools:train -- --config=task:parity --config.model.ratio="[0:1]"

This trains on lengths up to 40, and also evaluates on longer ones. The argument is `data.task`, see
`xlstm/dataset/tasks.py`. `docs/evidence.md` has the results.
"""

from xlstm.dataset.tasks import create_task
from xlstm.tools.config import default_config


def get_config(task: str = ""):
    """Returns the configuration of a task."""
    definition = create_task(task)
    num_words, longest = len(definition.words), definition.max_length
    config = default_config()
    config.model.block = "xlstm_2024"  # The block of the paper.
    config.model.ratio = "[1:1]"  # Both kinds of blocks; try "[1:0]" and "[0:1]" too.
    config.model.vocab_size = -(-num_words // 8) * 8  # The words, rounded up for even shards.
    config.model.embedding_dim = 64  # Small: the tasks need structure rather than size.
    config.model.num_blocks = 2  # The smallest number with both kinds.
    config.model.num_heads = 1  # One head mixes all channels of an sLSTM block.
    config.model.slstm_recurrent_scale = 4.0  # Large; with small ones it learns to count only.
    config.model.gate_soft_cap = 0.0  # The paper has no soft caps.
    config.model.output_logit_soft_cap = 0.0  # The paper has no soft caps.
    config.model.remat = "none"  # The model is small enough.
    config.backend.chunk_size = 32  # The fastest for small heads on a CPU.
    config.data.task = task  # The argument.
    config.data.context_length = 64  # One example of length 40, or several shorter ones.
    config.data.batch_size = 64  # 4,096 tokens per step.
    config.data.validation_lengths = ("1-40", "41-64", "65-128", "129-256")  # Length extrapolation.
    if longest is not None:  # Recall: lengths are numbers of pairs.
        config.data.context_length = 128  # 31 pairs.
        config.data.batch_size = 32  # Still 4,096 tokens per step.
        config.data.task_lengths = (min(4, longest), min(24, longest))  # Many questions per row.
        config.data.validation_lengths = (f"{min(24, longest)}-{min(24, longest)}",)  # The hardest.
    config.schedule.peak_lr = 4e-3  # High, as small models need.
    config.schedule.warmup_steps = 50  # A thirtieth of the run.
    config.trainer.num_steps = 1500  # A few minutes on two CPU cores.
    config.trainer.eval_interval = 250  # Six evaluations in all.
    config.trainer.eval_batches = 4  # Half of each set.
    config.trainer.checkpoint_interval = 500  # A third of the run.
    config.logger.sample_tokens = 0  # The task has no text to sample.
    return config
