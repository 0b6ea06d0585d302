import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.inference.sampling import SamplingConfig, filter_logits, sample

PROBABILITIES = np.array([[0.05, 0.4, 0.2, 0.3, 0.05], [0.1, 0.1, 0.1, 0.1, 0.6]])
LOGITS = jnp.asarray(np.log(PROBABILITIES) + 3, jnp.float32)
UNSEEN = jnp.zeros(LOGITS.shape, bool)


def kept(seen=UNSEEN, **options):
    """Returns the tokens that each row keeps, and their probabilities."""
    logits = filter_logits(LOGITS, seen, SamplingConfig(**options))
    return [set(np.flatnonzero(row > -np.inf)) for row in logits], jax.nn.softmax(logits, axis=-1)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
        ({"temperature": 0.0}, [{1}, {4}]),
        ({"top_k": 2}, [{1, 3}, {0, 1, 2, 3, 4}]),  # Ties are kept.
        ({"top_k": 1}, [{1}, {4}]),
        ({"top_k": 100}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
        ({"top_p": 0.65}, [{1, 3}, {0, 1, 2, 3, 4}]),
        ({"top_p": 0.71}, [{1, 2, 3}, {0, 1, 2, 3, 4}]),
        ({"top_p": 1e-6}, [{1}, {4}]),
        ({"min_p": 0.45}, [{1, 2, 3}, {4}]),
        ({"min_p": 1.0}, [{1}, {4}]),
        ({"vocab_size": 2}, [{0, 1}, {0, 1}]),
        ({"vocab_size": 3, "temperature": 0.0}, [{1}, {0, 1, 2}]),
        ({"top_k": 3, "top_p": 0.7}, [{1, 3}, {0, 1, 2, 3, 4}]),
    ],
)
def test_which_tokens_are_left(options, expected):
    assert kept(**options)[0] == expected


def test_what_is_left_keeps_its_proportions():
    probabilities = kept(top_k=2, temperature=0.5)[1][0]
    expected = np.array([0, 0.4**2, 0, 0.3**2, 0])
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-5)


def test_the_penalty_makes_seen_tokens_less_likely():
    seen = UNSEEN.at[0, 1].set(True).at[1, 0].set(True)
    probabilities = kept(seen, repetition_penalty=2.0)[1]
    logits = np.log(PROBABILITIES) + 3  # 2.08 and 0.70 for the tokens that were seen.
    logits[0, 1] /= 2
    logits[1, 0] /= 2
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    negative = filter_logits(-LOGITS, seen, SamplingConfig(repetition_penalty=2.0))
    assert negative[0, 1] - negative[0, 0] < -LOGITS[0, 1] + LOGITS[0, 0]


def test_tokens_follow_the_distribution_and_the_keys():
    config = SamplingConfig(temperature=1.5, top_k=3)
    draw = jax.jit(functools.partial(sample, config=config))
    logits, seen = (jnp.repeat(x[:1], 4000, axis=0) for x in (LOGITS, UNSEEN))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = draw(logits, seen, keys)
    expected = np.array([0, 0.4, 0.2, 0.3, 0]) ** (1 / 1.5)
    shares = np.bincount(tokens, minlength=5) / 4000
    assert np.abs(shares - expected / expected.sum()).max() < 0.03
    np.testing.assert_array_equal(draw(logits, seen, keys), tokens)
    assert np.any(draw(logits, seen, keys[::-1]) != tokens)


def test_a_tiny_temperature_takes_the_likeliest():
    config = SamplingConfig(temperature=1e-30)
    tokens = sample(LOGITS * 1e3, UNSEEN, jax.random.split(jax.random.key(0), 2), config)
    np.testing.assert_array_equal(tokens, [1, 4])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"vocab_size": 0},
    ],
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: it must"):
        SamplingConfig(**options)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: it must be a finite number$"):
        SamplingConfig(**{name: value})
