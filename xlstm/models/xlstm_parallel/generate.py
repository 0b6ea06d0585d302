"""Sampling text from a model, a token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state, xLSTMLMModel


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "temperature", "vocab_size"))
def sample_tokens(
    params: PyTree,
    prompt: jax.Array,
    rng: PRNGKeyArray,
    *,
    config: LanguageModelConfig,
    num_tokens: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Continues prompts by sampling.

    The prompt is read in one call of the configured backend; then the state, of constant size, is
    carried from token to token.

    Args:
        params: Parameters of the model.
        prompt: Ids `(B, T)`; a document begins with the end-of-document id.
        rng: Random key.
        config: Configuration of the model.
        num_tokens: Number of tokens to sample.
        temperature: Divides the logits; 0 takes the likeliest token.
        vocab_size: Ids from this on are never sampled: a model's vocabulary is often rounded up.

    Returns:
        The sampled ids `(B, num_tokens)`.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: it must not be negative")
    stepwise = dataclasses.replace(
        config, backend=dataclasses.replace(config.backend, name="recurrent")
    )

    def choose(logits: jax.Array, key: PRNGKeyArray) -> jax.Array:
        if vocab_size is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, logits / temperature)

    def step(carry, key):
        logits, state = carry
        token = choose(logits, key)
        logits, state = xLSTMLMModel(stepwise).apply(variables, token[:, None], state=state)
        return (logits[:, -1], state), token

    variables = {"params": params}
    state = initial_state(config, prompt.shape[0])
    logits, state = xLSTMLMModel(config).apply(variables, prompt, state=state)
    _, tokens = lax.scan(step, (logits[:, -1], state), jax.random.split(rng, num_tokens))
    return tokens.T
