import functools

import jax
import numpy as np
import pytest

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.inference import score as score_module
from xlstm.inference.decode import compute_logits
from xlstm.inference.loaded_model import LoadedModel
from xlstm.inference.score import score
from xlstm.models.xlstm_parallel.testing import lively_params, place_params, small_config

CONFIG = small_config(vocab_size=12)
MIXED = small_config(vocab_size=12, block="xlstm_2024", slstm_at=(1,))
LONGEST = 80


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 12, length).tolist() for length in lengths]


CONTEXTS, CONTINUATIONS = texts(1, 30, 7, 12, 1, 7, 33), texts(5, 1, 40, 3, 2, 0, 9, seed=1)


@functools.cache
def model(config=CONFIG, **axes):
    num_devices = 4 if axes else 1
    mesh = create_mesh(MeshConfig(**{"dp": 1} | axes), jax.devices()[:num_devices])
    params = lively_params(config, jax.random.key(1))
    return LoadedModel(config, place_params(params, config, mesh), mesh, tokenizer=None)


def direct(context, continuation, config=CONFIG):
    """Returns the score from the logits of the whole text, summed in float64."""
    text = np.zeros((1, LONGEST), int)
    text[0, : len(context) + len(continuation)] = [*context, *continuation]
    logits = np.asarray(compute_logits(model(config).params, text, config=config), np.float64)[0]
    log_probs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    first, rows = len(context) - 1, range(len(continuation))
    total = sum(log_probs[first + row, continuation[row]] for row in rows)
    return total, all(np.argmax(logits[first + row]) == continuation[row] for row in rows)


def assert_scores(found, expected):
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in expected], atol=1e-4)
    assert [x[1] for x in found] == [x[1] for x in expected]


def greedy(context, length, config=CONFIG):
    ids = list(context)
    for _ in range(length):
        text = np.zeros((1, LONGEST), int)
        text[0, : len(ids)] = ids
        logits = compute_logits(model(config).params, text, config=config)
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[len(context) :]


@pytest.mark.parametrize(
    ("config", "batch_size"),
    [(CONFIG, 1), (CONFIG, 3), (CONFIG, 8), (MIXED, 8)],
    ids=["1", "3", "8", "mixed"],
)
def test_scores_of_ragged_texts_are_those_of_each_text_alone(config, batch_size):
    found = score(model(config), CONTEXTS, CONTINUATIONS, batch_size=batch_size)
    pairs = zip(CONTEXTS, CONTINUATIONS, strict=True)
    assert_scores(found, [direct(*pair, config) for pair in pairs])


def test_the_likeliest_tokens_are_greedy_up_to_one_that_is_not():
    likeliest = greedy(CONTEXTS[1], 6)
    other = [*likeliest[:5], (likeliest[5] + 1) % 12]
    found = score(model(), [CONTEXTS[1]] * 3, [likeliest, other, likeliest[:3]])
    assert [x.is_greedy for x in found] == [True, False, True]
    assert found[0].log_likelihood < found[2].log_likelihood


def test_no_continuation_is_certain():
    assert score(model(), [[1, 2]], [[]]) == [(0.0, True)]
    assert score(model(), [], []) == []


@pytest.mark.parametrize(
    ("axes", "batch_size"), [({"tp": 2, "fsdp": 2}, 4), ({"dp": 4}, 8), ({"dp": 4}, 3)], ids=str
)
def test_scores_on_a_mesh_are_the_same(axes, batch_size):
    contexts, continuations = CONTEXTS + texts(5, 6, seed=2), CONTINUATIONS + texts(4, 4, seed=3)
    found = score(model(**axes), contexts, continuations, batch_size=batch_size)
    assert_scores(found, score(model(), contexts, continuations, batch_size=batch_size))


def test_a_context_is_read_once_for_all_its_continuations(monkeypatch):
    read, prefill_step = [], score_module.prefill_step

    def counting(params, tokens, state, lengths, **options):
        read.append(int(lengths.sum()))
        return prefill_step(params, tokens, state, lengths, **options)

    monkeypatch.setattr(score_module, "prefill_step", counting)
    contexts = [CONTEXTS[i] for i in (1, 2, 1, 2, 1, 1)]
    continuations = texts(3, 1, 2, 5, 1, 4, seed=5)
    found = score(model(), contexts, continuations, batch_size=2)
    # The last token of a context is read with each continuation.
    assert read == [(30 - 1) + (7 - 1)]
    pairs = zip(contexts, continuations, strict=True)
    assert_scores(found, [direct(*pair) for pair in pairs])


def test_long_texts_are_read_in_parts_of_few_shapes(monkeypatch):
    shapes, score_step = [], score_module.score_step

    def watched(params, tokens, *args, **options):
        shapes.append(tokens.shape)
        return score_step(params, tokens, *args, **options)

    monkeypatch.setattr(score_module, "score_step", watched)
    monkeypatch.setattr(score_module, "_PASS_LOGITS", 12 * 2 * 17)
    monkeypatch.setattr(score_module, "_PASS_TOKENS", 2 * 16)
    contexts, continuations = texts(3, 40), texts(70, 35, seed=1)
    found = score(model(), contexts, continuations, batch_size=2)
    assert shapes == [(2, 16)] * 5
    pairs = zip(contexts, continuations, strict=True)
    assert_scores(found, [direct(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("length", "largest", "parts"),
    [
        (0, 64, []),
        (1, 64, [(0, 4)]),
        (5, 64, [(0, 16)]),
        (65, 64, [(0, 64), (64, 4)]),
        (90, 70, [(0, 64), (64, 64)]),
        (3, 1, [(0, 1), (1, 1), (2, 1)]),
        (3, 0, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_parts_cover_a_length(length, largest, parts):
    assert list(score_module._parts(length, largest)) == parts


def test_scores_arrive_with_their_indices():
    arrived = {}
    found = score(
        model(), CONTEXTS, CONTINUATIONS, batch_size=2, on_score=lambda i, x: arrived.update({i: x})
    )
    assert found == [arrived[index] for index in range(len(CONTEXTS))]


@pytest.mark.parametrize(
    ("contexts", "continuations", "batch_size", "message"),
    [
        ([[]], [[1]], 8, "prompt 0 is empty"),
        ([[1], [12]], [[1], [1]], 8, "prompt 1 has the token id 12"),
        ([[1], [1]], [[1], [-1]], 8, "prompt 1 has the token id -1"),
        ([[1]], [[1]], 0, "batch_size=0: it must be at least 1"),
    ],
)
def test_bad_input_is_named(contexts, continuations, batch_size, message):
    with pytest.raises(ValueError, match=message):
        score(model(), contexts, continuations, batch_size=batch_size)
