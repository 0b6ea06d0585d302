"""A small byte-level model of the Python standard library: about two minutes on two cores.

    bazel run //xlstm/tools:train

The validation loss falls from above 5.5 to below 1.5 nats per byte.
"""

from xlstm.tools.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.model.embedding_dim = 128  # 0.9M parameters with four blocks.
    config.backend.chunk_size = 32  # The fastest for small heads on a CPU.
    config.data.context_length = 256  # About seven lines of code.
    config.data.batch_size = 16  # 4,096 tokens per step.
    config.schedule.peak_lr = 4e-3  # High, as small models need.
    config.schedule.warmup_steps = 30  # A tenth of the run.
    config.trainer.num_steps = 350  # 1.4M tokens.
    config.trainer.eval_interval = 70  # Six evaluations in all.
    config.trainer.eval_batches = 12  # 49k tokens each.
    config.trainer.checkpoint_interval = 70  # A fifth of the run.
    return config
