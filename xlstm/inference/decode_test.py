import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.inference import decode as decode_module
from xlstm.inference.decode import (
    PAD_ID,
    decode,
    decode_step,
    generate,
    init_decode_state,
    prefill,
    prefill_step,
    row_keys,
    rows_spec,
)
from xlstm.inference.sampling import SamplingConfig
from xlstm.models.xlstm_parallel.testing import lively_params, place_params, small_config
from xlstm.models.xlstm_parallel.xlstm_lm_model import state_specs, xLSTMLMModel

CONFIG = small_config(vocab_size=12)
PARAMS = lively_params(CONFIG, jax.random.key(1))
PROMPTS = np.random.default_rng(0).integers(0, 12, (3, 9))
LENGTHS = np.array([6, 9, 1])
KEYS = row_keys(jax.random.key(0), range(3))
GREEDY = SamplingConfig(temperature=0.0)
SAMPLING = SamplingConfig(temperature=1.5, repetition_penalty=1.2)


@functools.cache
def _jitted_logits():
    return jax.jit(xLSTMLMModel(CONFIG).apply)


def logits_of(tokens):
    return np.asarray(_jitted_logits()({"params": PARAMS}, tokens))


def prefilled(tokens, lengths, decode_state=None):
    """Returns the state after prompts, padded to one shape so that one compilation is enough."""
    padded = np.zeros((3, 20), int)
    padded[: len(tokens), : tokens.shape[1]] = tokens
    decode_state = decode_state or init_decode_state(CONFIG, 3)
    return prefill(PARAMS, decode_state, padded, np.resize(lengths, 3), config=CONFIG)


def decoded(decode_state, num_tokens=12, keys=KEYS, sampling=GREEDY, stop_ids=()):
    options = {"config": CONFIG, "sampling": sampling, "max_tokens": 12, "stop_ids": stop_ids}
    return decode(PARAMS, decode_state, keys, num_tokens, **options)


def assert_same_row(found, row, expected, expected_row):
    assert found.num_tokens[row] == expected.num_tokens[expected_row]
    np.testing.assert_array_equal(found.seen[row], expected.seen[expected_row])
    np.testing.assert_allclose(found.logits[row], expected.logits[expected_row], atol=1e-4)
    for x, y in zip(found.state, expected.state, strict=True):
        np.testing.assert_allclose(x[:, row], y[:, expected_row], atol=1e-4)


def test_greedy_tokens_are_the_likeliest_of_the_whole_text():
    tokens = generate(
        PARAMS,
        PROMPTS,
        jax.random.key(0),
        config=CONFIG,
        max_tokens=8,
        lengths=LENGTHS,
        sampling=GREEDY,
    )
    assert tokens.shape == (3, 8)
    text = np.zeros((3, 20), int)
    for row, length in enumerate(LENGTHS):
        text[row, : length + 8] = np.append(PROMPTS[row, :length], tokens[row])
    likeliest = np.argmax(logits_of(text), axis=-1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(tokens[row], likeliest[row, length - 1 : length + 7])


def test_decoding_gives_the_logits_of_the_whole_text():
    logits, state = prefill_step(PARAMS, PROMPTS[:, :4], config=CONFIG)
    found, sizes = [logits], {tuple(x.size for x in state)}
    for position in range(4, 9):
        logits, state = decode_step(PARAMS, PROMPTS[:, position], state, config=CONFIG)
        found.append(logits)
        sizes.add(tuple(x.size for x in state))
    text = np.zeros((3, 20), int)
    text[:, :9] = PROMPTS
    np.testing.assert_allclose(np.stack(found, axis=1), logits_of(text)[:, 3:9], atol=1e-4)
    assert len(sizes) == 1  # The state does not grow.


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_a_prompt_in_a_batch_gives_what_it_gives_alone_and_in_several_goes(sampling):
    together, tokens = decoded(prefilled(PROMPTS, LENGTHS), sampling=sampling)
    for row, length in enumerate(LENGTHS):
        decode_state = prefilled(PROMPTS[[row] * 3, :length], length)
        parts, keys = [], KEYS[np.array([row] * 3)]
        for size in (1, 5, 0, 6):
            decode_state, part = decoded(decode_state, size, keys, sampling)
            assert np.all(part[:, size:] == PAD_ID)
            parts.append(part[0, :size])
        np.testing.assert_array_equal(np.concatenate(parts), tokens[row])
        assert_same_row(together, row, decode_state, 0)


def test_a_long_prompt_in_pieces_is_the_prompt(monkeypatch):
    tokens = np.random.default_rng(1).integers(0, 12, (3, 20))
    lengths = np.array([20, 11, 20])
    expected = prefilled(tokens, lengths)
    monkeypatch.setattr(decode_module, "_PREFILL_TOKENS", 21)
    other = dataclasses.replace(CONFIG, backend=dataclasses.replace(CONFIG.backend, chunk_size=3))
    found = prefill(PARAMS, init_decode_state(CONFIG, 3), tokens, lengths, config=other)
    for row in range(3):
        assert_same_row(found, row, expected, row)


def test_a_row_that_is_done_is_left_as_it_is():
    free = np.asarray(decoded(prefilled(PROMPTS, LENGTHS))[1])
    stop_id = int(free[1, 4])  # Ends this row there, and perhaps others.
    ends = [(list(row).index(stop_id) if stop_id in row else 11) + 1 for row in free]
    assert min(ends) <= 5 and len(set(ends)) > 1
    decode_state, tokens = decoded(prefilled(PROMPTS, LENGTHS), stop_ids=(stop_id,))
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(tokens[row, :end], free[row, :end])
        assert np.all(tokens[row, end:] == PAD_ID)
        expected, _ = decoded(prefilled(PROMPTS, LENGTHS), end)
        assert_same_row(decode_state, row, expected, row)


def test_more_text_behind_what_was_read():
    lengths = np.array([3, 9, 0])
    more = prefilled(PROMPTS[::-1], lengths, prefilled(PROMPTS, LENGTHS))
    for row, (first, second) in enumerate(zip(LENGTHS, lengths, strict=True)):
        text = np.append(PROMPTS[row, :first], PROMPTS[::-1][row, :second])
        assert_same_row(more, row, prefilled(text[None], len(text)), 0)
        assert set(np.flatnonzero(more.seen[row])) == set(text)


@pytest.mark.parametrize(
    "axes, options",
    [
        ({"tp": 2, "fsdp": 2}, {}),
        ({"tp": 2, "fsdp": 2}, {"block": "xlstm_2024", "slstm_at": (1,)}),
        ({"dp": 4}, {}),
    ],
)
def test_on_a_mesh_it_is_the_same(axes, options):
    mesh = create_mesh(MeshConfig(**({"dp": 1} | axes)), jax.devices()[:4])
    config = small_config(vocab_size=12, **options)
    whole = lively_params(config, jax.random.key(1))
    params = place_params(whole, config, mesh)
    prompts, lengths = np.resize(PROMPTS, (4, 9)), np.array([6, 9, 1, 3])
    rows = NamedSharding(mesh, rows_spec(4, mesh))
    on_mesh = [jax.device_put(x, rows) for x in (prompts, lengths)]
    keys = row_keys(jax.random.key(0), range(4))
    decode_state = init_decode_state(config, 4, mesh)
    decode_state = prefill(params, decode_state, *on_mesh, config=config)
    options = {"config": config, "sampling": GREEDY, "max_tokens": 6}
    decode_state, tokens = decode(params, decode_state, keys, 6, **options)
    expected = generate(
        whole,
        prompts,
        jax.random.key(0),
        config=config,
        max_tokens=6,
        lengths=lengths,
        sampling=GREEDY,
    )
    np.testing.assert_array_equal(tokens, expected)
    # What grows with the batch and the heads stays sharded.
    for x, spec in zip(
        jax.tree.leaves(decode_state.state),
        jax.tree.leaves(state_specs(config, *rows_spec(4, mesh))),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding


def test_rows_that_do_not_divide_are_everywhere():
    mesh = create_mesh(MeshConfig(dp=4), jax.devices()[:4])
    assert init_decode_state(CONFIG, 3, mesh).logits.sharding.is_fully_replicated
    assert not init_decode_state(CONFIG, 4, mesh).logits.sharding.is_fully_replicated
