import itertools

import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.task_data import TaskData
from xlstm.dataset.testing import assert_equal_batches

_FIELDS = {"task": "parity", "context_length": 48, "batch_size": 4}


def _data(**fields):
    return TaskData(DataConfig(**_FIELDS | fields))


def _take(data, count, **options):
    return list(itertools.islice(data.train_batches(**options), count))


def test_rows_are_whole_examples_with_a_reset_each():
    data = _data(task="recall:9", task_lengths=(1, 9))
    words = data.tokenizer
    for batch in _take(data, 5):
        assert batch.inputs.shape == (4, 48) and batch.inputs.dtype == np.int32
        np.testing.assert_array_equal(batch.reset, batch.inputs == 0)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for tokens, targets, mask in zip(
            batch.inputs, batch.targets, batch.targets_mask, strict=True
        ):
            tokens = np.append(tokens, targets[-1])
            mask = np.append(False, mask)
            starts = np.flatnonzero(tokens == 0)
            assert starts[0] == 0 and starts.size > 1
            for start, stop in zip(starts, np.append(starts[1:], tokens.size), strict=True):
                if start + 1 == stop:
                    continue  # Padding.
                text = words.decode(tokens[start:stop]).split()
                pairs, questions = text[: text.index("=")], text[text.index("=") + 1 :]
                # All keys are asked, so no example is truncated; only the values count.
                assert sorted(questions) == sorted(pairs)
                answers = [words.decode([t]) for t in tokens[start:stop][mask[start:stop]]]
                assert answers == questions[1::2]
            assert mask.any()


def test_a_row_is_a_function_of_seed_and_number_alone():
    whole = _take(_data(), 6)
    assert_equal_batches(_take(_data(), 2, start_step=4), whole[4:])
    for share in range(2):
        rows = _take(_data(), 6, shard_index=share, shard_count=2)
        for part, batch in zip(rows, whole, strict=True):
            np.testing.assert_array_equal(part.inputs, batch.inputs[2 * share : 2 * share + 2])
    # With a ramp, the same rows come in other batches.
    ramp = _take(_data(ramp_batch_sizes=(2,), ramp_steps=(2,)), 6)
    joined = [np.concatenate([batch.inputs for batch in batches]) for batches in (ramp, whole)]
    np.testing.assert_array_equal(joined[0], joined[1][: len(joined[0])])
    assert np.any(_take(_data(seed=1), 1)[0].inputs != whole[0].inputs)
    assert len({row.tobytes() for row in joined[1]}) == len(joined[1])


def test_origins_are_the_numbers_of_the_rows():
    origins = _data().batch_origins(2)
    assert [origin.first_document for origin in origins] == [8, 9, 10, 11]
    assert {origin.store for origin in origins} == {"task parity"}


def test_validation_sets_have_their_lengths():
    data = _data(validation_lengths=("1-40", "41-96"))
    short, long = data.validation_sets()
    assert (short.name, long.name) == ("lengths_1_40", "lengths_41_96")
    assert short.num_bytes() is None
    batches = list(long.batches(max_batches=3))
    assert len(batches) == 3 and len(list(long.batches())) == 128
    for batch in batches:
        assert batch.inputs.shape == (
            4,
            144,
        )  # The first multiple of 48 from 99 - 1 on.
        answers = np.argwhere(batch.targets_mask)
        for row, position in answers:
            start = np.flatnonzero(batch.inputs[row, : position + 1] == 0)[-1]
            assert 41 <= position - start - 1 <= 96
    # The same for every run, and different from the training rows.
    again = _data(validation_lengths=("41-96",), seed=5).validation_sets()[0]
    assert_equal_batches(list(again.batches(max_batches=3)), batches)
    half = list(long.batches(max_batches=3, shard_index=1, shard_count=2))
    np.testing.assert_array_equal(half[0].inputs, batches[0].inputs[2:])
    first = next(iter(short.batches()))
    assert np.any(first.inputs != _take(_data(), 1)[0].inputs)


def test_the_tokenizer_has_the_words():
    tokenizer = _data().tokenizer
    assert tokenizer.vocab_size == 4 and tokenizer.eod_id == 0
    assert tokenizer.encode("0 1 1 =").tolist() == [2, 3, 3, 1]
    assert tokenizer.decode([2, 3, 1]) == "0 1 ="
    assert tokenizer.fingerprint == _data(seed=3).tokenizer.fingerprint
    assert tokenizer.fingerprint != _data(task="cycle_nav").tokenizer.fingerprint


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"task_lengths": (1, 60)}, "length 60 has 63 tokens: expected at most the 49 of a row"),
        (
            {"task_lengths": (0, 4)},
            r"task_lengths must be two lengths .* is \(0, 4\)",
        ),
        ({"task_lengths": (5,)}, "task_lengths must be two lengths of at least 1"),
        ({"validation_lengths": ("40",)}, "validation_lengths has '40': expected two lengths"),
        ({"validation_lengths": ("9-3",)}, "validation_lengths has '9-3': expected two lengths"),
        ({"validation_lengths": ("1-3", "1-3")}, "validation_lengths has duplicates"),
        ({"weights": (1.0,)}, "replaces the stores: leave data.weights and"),
        ({"task": "recall:8", "task_lengths": (1, 9)}, "recall:8' has examples of lengths up to 8"),
        ({"task": "parrot"}, "data.task='parrot' is unknown"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        _data(**fields)


def test_lengths_are_for_tasks():
    with pytest.raises(ValueError, match="data.validation_lengths needs a data.task"):
        DataConfig(validation_lengths=("1-4",))
