"""A complete run in seconds, of a model too small to learn much: `--config=smoke`."""

from xlstm.tools.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.model.embedding_dim = 32  # 8 for each of the four heads.
    config.model.num_blocks = 2  # The smallest number that tests the scan over blocks.
    config.model.ffn_round_up_to_multiple_of = 8  # The default would double the small layer.
    config.backend.chunk_size = 16  # Four chunks in a context.
    config.mesh.fsdp_min_weight_size = 256  # Small, so that fsdp shards some weights.
    config.data.context_length = 64  # Short.
    config.data.batch_size = 8  # Divides over eight devices.
    config.schedule.warmup_steps = 5  # A quarter of the run.
    config.trainer.num_steps = 20  # Enough to see the loss fall.
    config.trainer.eval_interval = 10  # One evaluation in the middle.
    config.trainer.eval_batches = 2  # 1,024 tokens.
    config.trainer.checkpoint_interval = 10  # One checkpoint in the middle.
    config.logger.interval = 1  # Every step.
    config.logger.sample_tokens = 32  # One line.
    return config
