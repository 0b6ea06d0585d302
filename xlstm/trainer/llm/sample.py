"""Text that a model writes."""

import jax
import numpy as np

from xlstm.common_types import PyTree
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.models.xlstm_parallel.generate import sample_tokens
from xlstm.trainer.llm.config import RunConfig


def sample_text(config: RunConfig, params: PyTree, tokenizer: Tokenizer) -> str:
    """Samples text as `config.logger` says.

    Args:
        config: The run's configuration.
        params: Parameters of the model.
        tokenizer: The tokenizer of the data.

    Returns:
        The prompt and what follows, up to the end of the document.
    """
    prompt = [tokenizer.eod_id, *tokenizer.encode(config.logger.sample_prompt).tolist()]
    ids = sample_tokens(
        params,
        np.asarray([prompt], np.int32),
        jax.random.PRNGKey(config.trainer.seed),
        config=config.language_model,
        num_tokens=config.logger.sample_tokens,
        temperature=config.logger.sample_temperature,
        vocab_size=tokenizer.vocab_size,
    )
    ids = np.asarray(ids[0]).tolist()
    if tokenizer.eod_id in ids:
        ids = ids[: ids.index(tokenizer.eod_id)]
    return config.logger.sample_prompt + tokenizer.decode(ids)
