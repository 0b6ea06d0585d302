import numpy as np
import pytest
import tokenizers

from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.testing import random_text, tokenizer_families, write_tokenizer_json
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer
from xlstm.inference.completion_detokenizer import CompletionDetokenizer


def _chunks(detokenizer, ids, size):
    chunks = [detokenizer.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*chunks, detokenizer.finish()]


@pytest.fixture(scope="module", params=["byte", "json"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte":
        return ByteTokenizer()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return load_tokenizer(write_tokenizer_json(str(path), words=["grüße", " hello"]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_make_up_the_text(tokenizer, size):
    text = "grüße, 🙂🙃 hello hello�!\nß"
    ids = tokenizer.encode(text).tolist()
    chunks = _chunks(CompletionDetokenizer(tokenizer, [], []), ids, size)
    assert "".join(chunks) == text
    if size < len(ids):
        assert len([chunk for chunk in chunks if chunk]) > 3  # Does not wait for the end.


def test_a_piece_never_has_half_a_character():
    ids = list("ä🙂".encode())
    assert _chunks(CompletionDetokenizer(ByteTokenizer(), [], []), ids, 1) == [
        "",
        "ä",
        "",
        "",
        "",
        "🙂",
        "",
    ]
    # After whole characters, too, half a character is held back.
    detokenizer = CompletionDetokenizer(ByteTokenizer(), [], [])
    assert _chunks(detokenizer, [*b"abcdef", 0xC3, 0xA4], 7) == ["abcdef", "ä", ""]


def test_bytes_that_are_no_text_do_not_stop_it():
    detokenizer = CompletionDetokenizer(ByteTokenizer(), [], [])
    text = "".join(_chunks(detokenizer, [0xFF] * 9 + [ord("a"), 0xC3], 1))
    assert text == "\ufffd" * 9 + "a\ufffd"


def test_a_prompt_may_end_within_a_character():
    first, second = "ä".encode()
    assert CompletionDetokenizer(ByteTokenizer(), [65, first], []).add([second, ord("b")]) == "äb"


@pytest.mark.parametrize("name", sorted(tokenizer_families()))
def test_prompt_and_text_are_what_all_ids_decode_to(name):
    tokenizer, rng = JsonTokenizer(tokenizer_families()[name], name), np.random.default_rng(0)
    for _ in range(300):
        ids = [tokenizer.eod_id, *tokenizer.encode(random_text(rng, 20)).tolist()]
        cut = int(rng.integers(0, len(ids) + 1))
        detokenizer = CompletionDetokenizer(tokenizer, ids[:cut], ["never"])
        text = "".join(_chunks(detokenizer, ids[cut:], int(rng.integers(1, 4))))
        assert detokenizer.prompt_text + text == tokenizer.decode(ids)


def test_a_prompt_may_end_with_what_stands_for_no_character():
    tokenizer = ByteTokenizer()
    prompt = tokenizer.encode("a\ufffd").tolist()
    detokenizer = CompletionDetokenizer(tokenizer, prompt, [])
    assert (detokenizer.prompt_text, detokenizer.add([98])) == ("a\ufffd", "b")


def test_tokens_without_a_text_do_not_cost_a_space(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁b": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["<unk>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    for size in (1, 2, 9):
        detokenizer = CompletionDetokenizer(tokenizer, [1, 2], [])
        assert "".join(_chunks(detokenizer, [3, 0, 0, 2, 1, 3], size)) == " b a b"


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_stop_string_ends_the_text_and_is_not_in_it(tokenizer, size):
    ids = tokenizer.encode("one # two ## three END four").tolist()
    for stops, expected in [
        (["##"], "one # two "),
        (["END", "three"], "one # two ## "),
        (["###", "f"], "one # two ## three END "),
        (["never"], "one # two ## three END four"),
        (["one"], ""),
    ]:
        detokenizer = CompletionDetokenizer(tokenizer, [], stops)
        assert "".join(_chunks(detokenizer, ids, size)) == expected
        assert detokenizer.is_stopped == (stops != ["never"])


def test_what_may_begin_a_stop_string_is_held_back():
    detokenizer = CompletionDetokenizer(ByteTokenizer(), [], ["\n\n"])
    assert [detokenizer.add([code]) for code in b"a\nb\n"] == ["a", "", "\nb", ""]
    assert detokenizer.finish() == "\n"
