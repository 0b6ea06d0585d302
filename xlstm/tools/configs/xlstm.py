"""Published sizes of the xLSTM-7B architecture: `--config=xlstm:125M`, `400M`, `1.4B` or `7B`.

    bazel run //xlstm/tools:train -- --config=xlstm:7B --config.data.stores="('/data/train',)"

Each size needs accelerators, and a token store with a real tokenizer
(`//xlstm/tools:prepare_data`). The fields that are set here follow the training recipe of "xLSTM
7B" (arXiv 2503.13427, section 4).
"""

from xlstm.tools.config import default_config

# Size: embedding_dim, num_blocks, num_heads, peak_lr.
_SIZES = {
    "125M": (768, 12, 4, 3e-3),
    "400M": (1024, 24, 4, 1.5e-3),
    "1.4B": (2048, 24, 4, 1e-3),
    "7B": (4096, 32, 8, 5e-4),
}


def get_config(size: str = ""):
    """Returns the configuration of a size."""
    if size not in _SIZES:
        raise ValueError(f"--config=xlstm:{size}: the sizes are {', '.join(_SIZES)}")
    embedding_dim, num_blocks, num_heads, peak_lr = _SIZES[size]
    config = default_config()
    config.model.vocab_size = 50304  # GPT-NeoX's 50277 tokens, rounded up for even shards.
    config.model.embedding_dim = embedding_dim  # From the table above.
    config.model.num_blocks = num_blocks  # From the table above.
    config.model.num_heads = num_heads  # From the table above.
    config.model.dtype = "bfloat16"  # Parameters, gates, states and norms stay in float32.
    config.data.stores = ("data",)  # Your token store, made by prepare_data.
    config.data.context_length = 8192  # As xLSTM-7B.
    config.data.batch_size = 512  # 4.2M tokens per step.
    config.data.validation_fraction = 0.001  # Enough of a large corpus.
    config.optimizer.grad_clip_norm = 0.5  # As xLSTM-7B.
    config.schedule.peak_lr = peak_lr  # From the table above.
    config.schedule.warmup_steps = 3000  # As xLSTM-7B.
    config.schedule.decay = "exponential"  # As xLSTM-7B.
    config.schedule.cooldown_steps = 7000  # About the last hundredth.
    config.trainer.num_steps = 550_000  # 2.3T tokens.
    config.trainer.eval_interval = 5000  # Every few hours.
    config.trainer.checkpoint_interval = 1000  # More than one per hour.
    return config
