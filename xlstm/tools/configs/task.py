"""Synthetic tasks for the mixes of mLSTM and sLSTM blocks: `--config=task:parity`.

`bazel run //xlstm/tools:train -- --config=task:parity --config.model.ratio="[0:1]"` trains on
lengths up to 40, and evaluates on longer ones too. The argument is `data.task`; see
`xlstm/dataset/tasks.py`. `docs/evidence.md` has what came out.
"""

from xlstm.dataset.tasks import create_task
from xlstm.tools.config import default_config


def get_config(task: str = ""):
    """Returns the configuration of a task."""
    made = create_task(task)
    words, longest = len(made.words), made.max_length
    config = default_config()
    config.model.block = "xlstm_2024"  # That of the paper.
    config.model.ratio = "[1:1]"  # Both kinds of blocks; "[1:0]" and "[0:1]" are the others.
    config.model.vocab_size = -(-words // 8) * 8  # The words, rounded up for even shards.
    config.model.embedding_dim = 64  # Small: the tasks need structure and not size.
    config.model.num_blocks = 2  # The least that can be mixed.
    config.model.num_heads = 1  # All channels of an sLSTM block are mixed.
    config.model.slstm_recurrent_scale = 4.0  # Large: small ones learn to count, and not to switch.
    config.model.gate_soft_cap = 0.0  # There are none in the paper.
    config.model.output_logit_soft_cap = 0.0  # There are none in the paper.
    config.model.remat = "none"  # There is room.
    config.backend.chunk_size = 32  # The fastest for such small heads on a CPU.
    config.data.task = task  # What the argument says.
    config.data.context_length = 64  # One example of length 40, or several shorter ones.
    config.data.batch_size = 64  # 4,096 tokens a step.
    config.data.validation_lengths = ("1-40", "41-64", "65-128", "129-256")  # Length extrapolation.
    if longest is not None:  # Recall: lengths are numbers of pairs.
        config.data.context_length = 128  # 31 pairs.
        config.data.batch_size = 32  # As many tokens a step.
        config.data.task_lengths = (min(4, longest), min(24, longest))  # Many questions a row.
        config.data.validation_lengths = (f"{min(24, longest)}-{min(24, longest)}",)  # The hardest.
    config.schedule.peak_lr = 4e-3  # High: small models like it.
    config.schedule.warmup_steps = 50  # Few.
    config.trainer.num_steps = 1500  # Some minutes on two CPU cores.
    config.trainer.eval_interval = 250  # Six in all.
    config.trainer.eval_batches = 4  # Half of each set.
    config.trainer.checkpoint_interval = 500  # So that a stopped run loses little.
    config.logger.sample_tokens = 0  # There is no text to sample.
    return config
