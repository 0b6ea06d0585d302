"""Synthetic tasks that tell architectures apart: formal languages and associative recall.

An example is a document of words: the document marker, an input, `=`, and the answer. In `recall`,
several questions follow the `=`, each with its answer. Only answers count in the loss.

References:
    Deletang et al., "Neural Networks and the Chomsky Hierarchy", 2022 (arXiv 2207.02098), table 1.
    Beck et al., "xLSTM", 2024 (arXiv 2405.04517), section 4.1.
    Arora et al., "Zoology", 2023 (arXiv 2312.04927), section 3 (multi-query associative recall).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

EOD_WORD, QUERY_WORD = "<eos>", "="
EOD_ID, QUERY_ID = 0, 1
_FIRST = 2  # The id of a task's first word.


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: a generator of examples.

    Attributes:
        name: The name in the configuration, with its size if it has one.
        words: The word of each id; the marker and `=` come first.
        max_length: The largest length of an example; None if it is unbounded.
        make_example: Makes an example of a length from a generator: ids `(T,)` int32, and which of
            them are answers, `(T,)` bool.
        num_tokens: Returns `T`, the number of tokens, for a length.
    """

    name: str
    words: tuple[str, ...]
    max_length: int | None
    make_example: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    num_tokens: Callable[[int], int]


def create_task(text: str) -> Task:
    """Creates a task.

    Args:
        text: The name of the task, optionally followed by `:` and a size if the task has one.

    Returns:
        The task.

    Raises:
        ValueError: The task is unknown, or its size is impossible.
    """
    name, colon, size = text.partition(":")
    if name in _SIZED:
        make, default, smallest = _SIZED[name]
        if colon and not (size.isascii() and size.isdigit() and int(size) >= smallest):
            raise ValueError(
                f"data.task={text!r}: the size of {name} must be an integer of at least {smallest}"
            )
        return make(text, int(size) if colon else default)
    if name in _PLAIN and not colon:
        return _PLAIN[name](text)
    known = [*_PLAIN, *(f"{name}[:size]" for name in _SIZED)]
    raise ValueError(f"data.task={text!r} is unknown: choose one of {', '.join(known)}")


def _answering(
    name: str, words: list[str], draw: Callable, answer: Callable[[np.ndarray], int]
) -> Task:
    """Returns a task of one question: `draw` makes the input, `answer` its answer, as indices."""

    def make_example(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        x = draw(rng, length)
        body = [EOD_ID], _FIRST + x, [QUERY_ID, _FIRST + answer(x)]
        ids = np.concatenate(body).astype(np.int32)
        return ids, np.arange(ids.size) == ids.size - 1

    all_words = (EOD_WORD, QUERY_WORD, *words)
    return Task(name, all_words, None, make_example, lambda length: length + 3)


def _bits(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, 2, length)


def _parity(name: str) -> Task:
    """Returns the task of telling whether the number of ones is odd (regular)."""
    return _answering(name, ["0", "1"], _bits, lambda x: int(x.sum()) % 2)


def _even_pairs(name: str) -> Task:
    """Returns the task of telling whether neighbors differ an odd number of times (regular)."""
    # They do exactly if the first and the last word differ.
    return _answering(name, ["0", "1"], _bits, lambda x: int(x[0] != x[-1]))


def _majority(name: str) -> Task:
    """Returns the task of telling whether there are more ones than zeros (counting)."""
    return _answering(name, ["0", "1"], _bits, lambda x: int(2 * x.sum() > x.size))


def _cycle_nav(name: str, size: int) -> Task:
    """Returns the task of finding the position on a cycle of `size` after some steps (regular)."""
    words = [*map(str, range(size)), "back", "stay", "forward"]
    return _answering(
        name,
        words,
        lambda rng, length: size + rng.integers(0, 3, length),
        lambda x: int(np.sum(x - size - 1)) % size,
    )


def _mod_arithmetic(name: str, size: int) -> Task:
    """Returns the task of evaluating + - * of numbers modulo `size`, no brackets (regular).

    The length counts the words of the input; an input of even length starts with a sign, + or -.
    """
    words = [*map(str, range(size)), "+", "-", "*"]

    def draw(rng: np.random.Generator, length: int) -> np.ndarray:
        x = rng.integers(0, size, length)
        operators = np.arange(length) % 2 == (0 if length % 2 == 0 else 1)
        x[operators] = size + rng.integers(0, 3, int(operators.sum()))
        if length % 2 == 0:
            x[0] = size + rng.integers(0, 2)
        return x

    def answer(x: np.ndarray) -> int:
        total, sign, product = 0, 1, None
        for word in x.tolist():
            if word < size:
                product = word if product is None else product * word % size
            elif word < size + 2:
                total += sign * (product or 0)
                sign, product = (1 if word == size else -1), None
        return (total + sign * product) % size

    return _answering(name, words, draw, answer)


def _recall(name: str, size: int) -> Task:
    """Returns the task of giving the value of each key, in another order than its pairs.

    The length is the number of pairs, whose keys differ. There are `size` keys and `size` values.
    """
    words = (EOD_WORD, QUERY_WORD, *(f"k{n}" for n in range(size)), *(f"v{n}" for n in range(size)))

    def make_example(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.permutation(size)[:length]
        pairs = np.stack([_FIRST + keys, _FIRST + size + rng.integers(0, size, length)], axis=1)
        body = [EOD_ID], pairs.ravel(), [QUERY_ID], rng.permutation(pairs).ravel()
        ids = np.concatenate(body).astype(np.int32)
        positions = np.arange(ids.size)
        return ids, (positions > 2 * length + 1) & ((positions - 2 * length) % 2 == 1)

    return Task(name, words, size, make_example, lambda length: 4 * length + 2)


_PLAIN = {"parity": _parity, "even_pairs": _even_pairs, "majority": _majority}
# Each with its default size and its smallest size.
_SIZED = {
    "cycle_nav": (_cycle_nav, 5, 2),
    "mod_arithmetic": (_mod_arithmetic, 5, 2),
    "recall": (_recall, 64, 1),
}
