import re

import numpy as np
import pytest

from xlstm.dataset.tasks import EOD_WORD, QUERY_WORD, create_task

_NAMES = (
    "parity",
    "even_pairs",
    "majority",
    "cycle_nav",
    "cycle_nav:3",
    "mod_arithmetic",
    "recall",
)


def _examples(name, lengths, count=40):
    """Returns the words of the inputs and answers of random examples."""
    task, rng = create_task(name), np.random.default_rng(0)
    for length in lengths:
        for _ in range(count):
            ids, is_answer = task.make_example(rng, length)
            assert ids.dtype == np.int32 and ids.shape == is_answer.shape
            assert ids.size == task.num_tokens(length)
            words = [task.words[i] for i in ids]
            assert words[0] == EOD_WORD and words.count(EOD_WORD) == 1
            yield length, words, is_answer


def _with_one_answer(name, lengths=(1, 2, 3, 8, 41)):
    for length, words, is_answer in _examples(name, lengths):
        assert words[-2] == QUERY_WORD and len(words) == length + 3
        assert is_answer[-1] and is_answer.sum() == 1
        yield words[1:-2], words[-1]


def test_parity():
    for x, answer in _with_one_answer("parity"):
        assert answer == str(x.count("1") % 2)


def test_even_pairs():
    for x, answer in _with_one_answer("even_pairs"):
        differ = sum(a != b for a, b in zip(x, x[1:], strict=False))
        assert answer == str(differ % 2)


def test_majority():
    for x, answer in _with_one_answer("majority"):
        assert answer == str(int(x.count("1") > x.count("0")))


@pytest.mark.parametrize("name, size", [("cycle_nav", 5), ("cycle_nav:3", 3)])
def test_cycle_nav(name, size):
    for x, answer in _with_one_answer(name):
        position = 0
        for word in x:
            position = (position + {"back": -1, "stay": 0, "forward": 1}[word]) % size
        assert answer == str(position)


@pytest.mark.parametrize("name, size", [("mod_arithmetic", 5), ("mod_arithmetic:7", 7)])
def test_mod_arithmetic(name, size):
    for x, answer in _with_one_answer(name):
        text = " ".join(x)
        assert re.fullmatch(r"([+-] )?\d( [-+*] \d)*", text)
        assert answer == str(eval(text) % size)  # The words are a Python expression.


def test_recall():
    for length, words, is_answer in _examples("recall:20", (1, 2, 20)):
        pairs, questions = words[1 : 2 * length + 1], words[2 * length + 2 :]
        assert words[2 * length + 1] == QUERY_WORD
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(values) == length  # The keys differ.
        assert sorted(questions[::2]) == sorted(pairs[::2])
        assert questions[1::2] == [values[key] for key in questions[::2]]
        assert np.flatnonzero(is_answer).tolist() == list(range(2 * length + 3, len(words), 2))


@pytest.mark.parametrize("name", ["parity", "even_pairs", "majority"])
def test_guessing_is_right_half_of_the_time(name):
    answers = [words[-1] for _, words, _ in _examples(name, (31,), count=1000)]
    assert 430 < answers.count("1") < 570


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "data.task='' is unknown: choose one of parity, "),
        ("party", r"'party' is unknown: .* majority, cycle_nav\[:size\], "),
        ("parity:3", "'parity:3' is unknown"),
        ("cycle_nav:1", "the size of cycle_nav must be an integer of at least 2"),
        ("recall:", "the size of recall must be an integer of at least 1"),
        ("recall:-4", "the size of recall must be an integer of at least 1"),
    ],
)
def test_what_is_no_task(text, message):
    with pytest.raises(ValueError, match=message):
        create_task(text)


def test_words_differ():
    for name in ("parity", "even_pairs", "majority", "cycle_nav", "mod_arithmetic", "recall"):
        words = create_task(name).words
        assert len(set(words)) == len(words) and not any(" " in word for word in words)
