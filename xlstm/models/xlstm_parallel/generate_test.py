import functools

import jax
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.generate import sample_tokens
from xlstm.models.xlstm_parallel.testing import lively_params, small_config
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.testing.quick_compilation import QUICK_COMPILATION

CONFIG = small_config()
PARAMS = lively_params(CONFIG, jax.random.key(1))
PROMPT = np.random.default_rng(0).integers(0, 11, (2, 6))


@functools.cache
def _jitted_sample(num_tokens, temperature):
    options = {"config": CONFIG, "num_tokens": num_tokens, "temperature": temperature}
    sample = functools.partial(sample_tokens, **options)
    return jax.jit(sample, compiler_options=QUICK_COMPILATION)


def sample(seed=0, num_tokens=8, prompt=PROMPT, temperature=1.0):
    key = jax.random.key(seed)
    return np.asarray(_jitted_sample(num_tokens, temperature)(PARAMS, prompt, key))


def logits_of(tokens):
    apply = jax.jit(xLSTMLMModel(CONFIG).apply, compiler_options=QUICK_COMPILATION)
    return apply({"params": PARAMS}, tokens)


def test_temperature_zero_takes_the_likeliest_token():
    tokens = sample(temperature=0)
    assert tokens.shape == (2, 8)
    # The logits of the whole text, read at once, agree with every choice.
    text = np.concatenate([PROMPT, tokens], axis=1)
    np.testing.assert_array_equal(np.argmax(logits_of(text), axis=-1)[:, 5:-1], tokens)


def test_tokens_follow_the_distribution_and_the_key():
    prompt = np.tile(PROMPT[:1], (4000, 1))
    tokens = sample(prompt=prompt, num_tokens=1, temperature=1.5)
    expected = np.asarray(jax.nn.softmax(logits_of(PROMPT[:1])[0, -1] / 1.5))
    actual = np.bincount(tokens[:, 0], minlength=11) / 4000
    assert np.abs(actual - expected).max() < 0.04
    assert expected.max() < 0.9  # Else the test would be void.
    again = sample(prompt=prompt, num_tokens=1, temperature=1.5)
    np.testing.assert_array_equal(again, tokens)
    other = sample(seed=1, prompt=prompt, num_tokens=1, temperature=1.5)
    assert np.any(other != tokens)


def test_negative_temperature():
    with pytest.raises(ValueError, match="temperature=-1.*not be negative"):
        sample(temperature=-1)


def test_ids_beyond_the_vocabulary_are_not_sampled():
    options = {"config": CONFIG, "num_tokens": 50, "temperature": 5.0, "vocab_size": 3}
    sample = jax.jit(
        functools.partial(sample_tokens, **options), compiler_options=QUICK_COMPILATION
    )
    tokens = np.asarray(sample(PARAMS, PROMPT, jax.random.key(0)))
    assert set(np.unique(tokens)) == {0, 1, 2}
