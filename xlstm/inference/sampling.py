"""Sampling the next token from its logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PRNGKeyArray
from xlstm.finite import check_finite


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample tokens; the default samples from the model's own distribution.

    The repetition penalty applies first, then the temperature, then `top_k`, `top_p` and `min_p`,
    each to the tokens that the previous filter kept.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keeps this number of the most likely tokens; 0 keeps all.
        top_p: Keeps the smallest set of most likely tokens that has at least this probability.
        min_p: Keeps tokens that are at least this fraction as likely as the most likely one.
        repetition_penalty: Divides positive logits of tokens that have occurred, and multiplies
            negative ones; 1 disables it.
        vocab_size: Ids from this one on are never sampled: the vocabulary of a model is often
            padded. None for no bound.

    References:
        Fan et al., "Hierarchical Neural Story Generation", 2018 (top_k).
        Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top_p).
        Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024 (min_p).
        Keskar et al., "CTRL", 2019, section 4.1 (the penalty).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self):
        """Checks every field."""
        check_finite("", self)
        self._check("temperature", self.temperature >= 0, "must not be negative")
        self._check("top_k", self.top_k >= 0, "must not be negative; 0 keeps all tokens")
        self._check("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        self._check("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1")
        is_factor = self.repetition_penalty > 0
        self._check("repetition_penalty", is_factor, "must be positive; 1 disables it")
        has_tokens = self.vocab_size is None or self.vocab_size > 0
        self._check("vocab_size", has_tokens, "must be at least 1, or None")

    def _check(self, name: str, is_good: bool, rule: str) -> None:
        if not is_good:
            raise ValueError(f"{name}={getattr(self, name)}: it {rule}")


def filter_logits(logits: jax.Array, seen: jax.Array, config: SamplingConfig) -> jax.Array:
    """Applies the penalty, the temperature and the filters of a configuration to logits.

    Args:
        logits: Float32 `(B, V)`.
        seen: Which tokens have occurred, bool `(B, V)`.
        config: How to sample.

    Returns:
        Logits `(B, V)`, -inf for tokens that are filtered out; each row keeps at least one.
    """
    if config.vocab_size is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < config.vocab_size, logits, -jnp.inf)
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if config.temperature == 0:
        return jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), logits, -jnp.inf)
    # Subtracting the maximum first keeps large logits finite at a tiny temperature.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    if config.top_k:
        largest, _ = lax.top_k(logits, min(config.top_k, logits.shape[-1]))
        logits = jnp.where(logits < largest[..., -1:], -jnp.inf, logits)
    if config.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < config.top_p, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if config.min_p:
        logits = jnp.where(logits < math.log(config.min_p), -jnp.inf, logits)
    return logits


def sample(
    logits: jax.Array, seen: jax.Array, keys: PRNGKeyArray, config: SamplingConfig
) -> jax.Array:
    """Samples a token for each row.

    Args:
        logits: Float32 `(B, V)`.
        seen: Which tokens have occurred, bool `(B, V)`.
        keys: A random key for each row, `(B, ...)`.
        config: How to sample.

    Returns:
        Ids, int32 `(B,)`.
    """
    logits = filter_logits(logits, seen, config)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
