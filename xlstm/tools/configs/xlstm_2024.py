"""xLSTM[1:0] of the first xLSTM paper: `--config=xlstm_2024:125M`, `350M`, `760M` or `1.3B`.

    bazel run //xlstm/tools:train -- --config=xlstm_2024:125M --config.data.stores="('/data/c4',)"

All blocks are mLSTM blocks with an up-projection before the cell. Each size needs accelerators, and
a token store with a real tokenizer (`//xlstm/tools:prepare_data`). Sizes, numbers of parameters,
vocabulary, context and number of tokens follow "xLSTM: Extended Long Short-Term Memory" (arXiv
2405.04517, section 4.2 and appendix); learning rates follow similar sizes in `xlstm`.
"""

from xlstm.tools.config import default_config

# Size: embedding_dim, num_blocks, peak_lr.
_SIZES = {
    "125M": (768, 24, 3e-3),
    "350M": (1024, 48, 1.5e-3),
    "760M": (1536, 48, 1.25e-3),
    "1.3B": (2048, 48, 1e-3),
}


def get_config(size: str = ""):
    """Returns the configuration of a size."""
    if size not in _SIZES:
        raise ValueError(f"--config=xlstm_2024:{size}: the sizes are {', '.join(_SIZES)}")
    embedding_dim, num_blocks, peak_lr = _SIZES[size]
    config = default_config()
    config.model.block = "xlstm_2024"  # The mLSTM block of the paper.
    config.model.vocab_size = 50304  # 50257 or 50277 tokens of common tokenizers, rounded up.
    config.model.embedding_dim = embedding_dim  # From the table above.
    config.model.num_blocks = num_blocks  # From the table above.
    config.model.gate_soft_cap = 0.0  # The paper has no soft caps.
    config.model.output_logit_soft_cap = 0.0  # The paper has no soft caps.
    config.model.dtype = "bfloat16"  # Parameters, gates, states and norms stay in float32.
    config.data.stores = ("data",)  # Your token store, made by prepare_data.
    config.data.context_length = 2048  # As in the paper.
    config.data.batch_size = 256  # 0.5M tokens per step.
    config.data.validation_fraction = 0.001  # Enough of a large corpus.
    config.schedule.peak_lr = peak_lr  # From the table above.
    config.schedule.warmup_steps = 750  # A fortieth of the run.
    config.trainer.num_steps = 28_610  # 15B tokens, as in the paper's comparisons.
    config.trainer.eval_interval = 1000  # About thirty evaluations in all.
    config.trainer.checkpoint_interval = 500  # More than one per hour.
    return config
