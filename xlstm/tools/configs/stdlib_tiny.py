"""A small byte-level model on the Python standard library: some two minutes on two CPU cores.

`bazel run //xlstm/tools:train` trains it. The validation loss falls from above 5.5 to below 1.4
nats a byte.
"""

from xlstm.tools.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.model.embedding_dim = 128  # 0.9M parameters with four blocks.
    config.backend.chunk_size = 32  # The fastest for such small heads on a CPU.
    config.model.igate_bias_init = -3.0  # A short run has no time to open gates from -10.
    config.data.context_length = 256  # Some seven lines of code.
    config.data.batch_size = 16  # 4,096 tokens a step.
    config.optimizer.weight_decay = 0.1  # One pass over little data hardly overfits.
    config.schedule.peak_lr = 4e-3  # High: small models like it.
    config.schedule.warmup_steps = 30  # About a tenth of the run.
    config.schedule.decay_steps = 400  # The end of the run.
    config.trainer.num_steps = 400  # 1.6M tokens.
    config.trainer.eval_interval = 100  # Five evaluations in all.
    config.trainer.eval_batches = 12  # 49k tokens each.
    config.trainer.checkpoint_interval = 100  # So that a stopped run loses little.
    return config
