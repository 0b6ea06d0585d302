"""The whole path in seconds: a model too small to learn much."""

from xlstm.tools.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.model.embedding_dim = 32  # As small as four heads allow without being odd.
    config.model.num_blocks = 2  # The least that has something to scan over.
    config.model.ffn_round_up_to_multiple_of = 8  # Else rounding would double the layer.
    config.backend.chunk_size = 16  # Several chunks in a context.
    config.mesh.fsdp_min_weight_size = 256  # So that fsdp has something to cut.
    config.data.context_length = 64  # Short.
    config.data.batch_size = 8  # Divides over eight devices.
    config.schedule.warmup_steps = 5  # A quarter of the run.
    config.trainer.num_steps = 20  # Enough to see the loss fall.
    config.trainer.eval_interval = 10  # One in the middle.
    config.trainer.eval_batches = 2  # 1,024 tokens.
    config.trainer.checkpoint_interval = 10  # One in the middle.
    config.logger.interval = 1  # Every step.
    config.logger.sample_tokens = 32  # A line.
    return config
