import numpy as np
import pytest

from xlstm.dataset.detokenizer import StreamingDetokenizer
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.testing import random_text, tokenizer_families
from xlstm.dataset.tokenizer import ByteTokenizer

_CASES = 500  # For each family and kind of ids.


@pytest.fixture(scope="module", params=["byte", *sorted(tokenizer_families())])
def tokenizer(request):
    if request.param == "byte":
        return ByteTokenizer()
    return JsonTokenizer(tokenizer_families()[request.param], request.param)


def random_ids(tokenizer, rng, kind):
    if kind == "text":
        return tokenizer.encode(random_text(rng)).tolist()
    if kind == "bytes":
        high = [i for i, x in enumerate(tokenizer.pieces.middle) if len(x) == 1 and x[0] >= 0x80]
        some = [*high, *range(min(12, tokenizer.vocab_size))]
        return rng.choice(some, rng.integers(0, 25)).tolist()
    return rng.integers(0, tokenizer.vocab_size, rng.integers(0, 12)).tolist()


@pytest.mark.parametrize("kind", ["text", "bytes", "any"])
def test_text_that_comes_token_by_token_is_that_of_the_whole(tokenizer, kind):
    rng = np.random.default_rng(0)
    for _ in range(_CASES):
        ids = random_ids(tokenizer, rng, kind)
        detokenizer, text = tokenizer.detokenizer(), ""
        for i, token_id in enumerate(ids):
            text += detokenizer.add([token_id])
            whole = tokenizer.decode(ids[: i + 1])
            # No text comes too early; at most one character and one space are pending.
            assert whole.startswith(text)
            assert len(whole) - len(text) <= 2
        assert text + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["text", "bytes", "any"])
def test_text_that_comes_in_pieces_and_from_states_is_that_of_the_whole(tokenizer, kind):
    rng = np.random.default_rng(1)
    for _ in range(_CASES):
        ids = random_ids(tokenizer, rng, kind)
        cuts = sorted(rng.integers(0, len(ids) + 1, 3).tolist())
        text, state = "", None
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            detokenizer = StreamingDetokenizer(tokenizer.pieces, state)
            text += detokenizer.add(ids[start:stop])
            state = detokenizer.state
        assert text + detokenizer.finish() == tokenizer.decode(ids)


def test_whole_text_of_bytes_is_that_of_python():
    rng = np.random.default_rng(2)
    for _ in range(2000):
        content = bytes(
            rng.choice([0x41, 0xE0, 0xB8, 0xAA, 0xF0, 0x9F, 0xC3, 0xED, 0xFF], 8).tolist()
        )
        assert ByteTokenizer().decode(content) == content.decode("utf-8", "replace")


def test_a_real_replacement_character_is_not_waited_for():
    detokenizer = ByteTokenizer().detokenizer()
    assert detokenizer.add("a\ufffd".encode()) == "a\ufffd"
