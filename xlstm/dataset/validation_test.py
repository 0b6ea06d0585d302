import dataclasses
import json

import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.json_tokenizer import JsonTokenizer
from xlstm.dataset.store_data import train_batches
from xlstm.dataset.testing import (
    assert_equal_batches,
    config_for,
    random_text,
    seen_tokens,
    tokenizer_families,
    write_letter_store,
    write_store,
    write_tokenizer_json,
)
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.tokenizer import ByteTokenizer, load_tokenizer
from xlstm.dataset.validation import HELD_OUT, open_validation_sets

TEXTS = ["hello wörld", "日本語 hello", "plain", "naïve 🙂 world", "\N{EURO SIGN}" * 40]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_letter_store(tmp_path_factory.mktemp("data") / "store")


def held_out(config, *stores):
    (validation_set,) = open_validation_sets(config, stores)
    return validation_set


def named(path, **fields):
    """Returns the validation set of a whole store."""
    config = DataConfig(validation_stores=(f"named={path}",), validation_fraction=0.0, **fields)
    (validation_set,) = open_validation_sets(config, [])
    return validation_set


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_each_batch(store, count):
    validation_set = held_out(config_for(store), store)
    parts = [validation_set.batches(shard_index=i, shard_count=count) for i in range(count)]
    for batch, *shares in zip(validation_set.batches(), *parts, strict=True):
        assert batch.positions is None
        for field in ("inputs", "targets", "targets_mask", "reset"):
            rows = [getattr(share, field) for share in shares]
            np.testing.assert_array_equal(np.concatenate(rows), getattr(batch, field))


def test_no_document_is_both_trained_and_validated_on(store):
    for seed in (0, 1):
        config = config_for(store, seed=seed)
        validation = seen_tokens(held_out(config, store).batches())
        batches = train_batches(config, [store])
        training = seen_tokens(next(batches) for _ in range(60))
        assert len(validation) == 12
        assert not training & validation
        # All others, except perhaps one after the last window.
        assert len(training) >= 47
        if seed == 0:
            first = validation
    assert validation == first


def test_nothing_is_dropped_or_repeated(store):
    config = config_for(store, context_length=11, batch_size=7)
    batches = list(held_out(config, store).batches())
    assert {batch.inputs.shape for batch in batches} == {(7, 11)}
    targets = np.concatenate([batch.targets[batch.targets_mask] for batch in batches])
    validation = seen_tokens(batches)
    expected = store.tokens[:][np.isin(store.tokens[:], list(validation))]
    # Every token of these documents and their markers, except the first one.
    assert targets.size == expected.size + len(validation) - 1
    np.testing.assert_array_equal(np.sort(targets[targets != 0]), np.sort(expected))
    assert sum((~batch.targets_mask).sum() for batch in batches) > 0


def test_it_is_the_same_each_time_and_for_each_seed(store):
    validation_set = held_out(config_for(store), store)
    one = list(validation_set.batches())
    assert_equal_batches(one, list(validation_set.batches()))
    other = held_out(config_for(store, seed=5), store)
    assert_equal_batches(one, list(other.batches()))
    assert_equal_batches(one[:2], list(validation_set.batches(max_batches=2)))


def test_all_stores_are_held_out_of(store, tmp_path):
    other = write_letter_store(tmp_path / "other", first=61, documents=30)
    config = config_for(store, other, weights=(0.0, 1.0))
    assert len(seen_tokens(held_out(config, store, other).batches())) == 12 + 6


def test_held_out_and_named_sets(store, tmp_path):
    one = write_letter_store(tmp_path / "one", first=61, documents=30)
    two = write_letter_store(tmp_path / "a=b", first=91, documents=1)
    entries = (f"wiki_1={one.path}", f"B={two.path}")
    config = config_for(store, validation_stores=entries)
    sets = open_validation_sets(config, [store])
    assert [each.name for each in sets] == [HELD_OUT, "wiki_1", "B"]
    whole = {letter for letter in range(61, 91)}
    found = [seen_tokens(each.batches()) for each in sets]
    assert (len(found[0]), found[1:]) == (12, [whole, {91}])
    no_split = dataclasses.replace(config, validation_fraction=0.0)
    assert [each.name for each in open_validation_sets(no_split, [store])] == ["wiki_1", "B"]
    assert open_validation_sets(config_for(store, validation_fraction=0.0), [store]) == []


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("kind", ["byte", *sorted(tokenizer_families())])
def test_bytes_of_a_whole_store(tmp_path, kind, has_bos):
    rng = np.random.default_rng(0)
    texts = [*TEXTS, " a", "สวัสดีชาวโลก" * 20, *(random_text(rng) + "." for _ in range(40))]
    tokenizer = ByteTokenizer()
    if kind != "byte":
        tokenizer = JsonTokenizer(
            tokenizer_families()[kind], kind, None, "<s>" if has_bos else None
        )
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.definition or b"")
    store = write_store(tmp_path / "store", texts, tokenizer)
    expected = sum(len(text.encode()) for text in texts)
    assert store.meta.text_bytes == expected
    # Rows may split characters.
    for context_length, batch_size in ((1, 7), (5, 2), (16, 3), (64, 3), (1000, 4)):
        sizes = {"context_length": context_length, "batch_size": batch_size}
        assert named(store.path, **sizes).num_bytes() == expected


def test_bytes_in_stores_of_version_1(tmp_path):
    for kind, is_known in (("byte_level", True), ("byte_fallback_bpe", False)):
        tokenizer = JsonTokenizer(tokenizer_families()[kind], kind)
        store = write_store(tmp_path / kind, ["the cat", "größte"], tokenizer)
        meta = json.loads((tmp_path / kind / "meta.json").read_text())
        for name in ("bos_id", "bos_token"):
            del meta[name]
        (tmp_path / kind / "meta.json").write_text(json.dumps(meta | {"version": 1}))
        store = TokenStore.open(store.path)
        assert (store.meta.bos_id, store.meta.bos_token) == (tokenizer.eod_id, "</s>")
        expected = store.meta.text_bytes if is_known else None
        assert named(store.path, context_length=4).num_bytes() == expected


def test_bytes_of_the_first_batches(store):
    validation_set = held_out(config_for(store, batch_size=4), store)
    counts = []
    for max_batches in (1, 2, 2, 100, None):
        batches = validation_set.batches(max_batches=max_batches)
        targets = [batch.targets[batch.targets_mask] for batch in batches]
        counts.append(validation_set.num_bytes(max_batches))
        assert counts[-1] == np.count_nonzero(np.concatenate(targets))
    assert counts[0] < counts[1] == counts[2] < counts[3] == counts[4]


def test_bad_input(store, tmp_path):
    validation_set = held_out(config_for(store), store)
    with pytest.raises(ValueError, match="batch of 8 rows does not divide into 3 shards"):
        validation_set.batches(shard_count=3)
    with pytest.raises(ValueError, match="shard_index=2: expected one from 0 to 1"):
        validation_set.batches(shard_index=2, shard_count=2)
    single = write_store(tmp_path / "single", ["a" * 100])
    with pytest.raises(ValueError, match="token store .*single: .*0.2 of 1 documents"):
        open_validation_sets(config_for(single), [single])
    with pytest.raises(ValueError, match="no token store at .*nowhere"):
        named(tmp_path / "nowhere")
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    other = write_store(tmp_path / "other", ["text"], tokenizer)
    config = config_for(store, validation_stores=(f"other={other.path}",))
    with pytest.raises(ValueError, match="cannot be used in one run: .*different tokenizers"):
        open_validation_sets(config, [store])


def test_short_text(store):
    (batch,) = held_out(config_for(store, context_length=100_000), store).batches()
    assert len(seen_tokens([batch])) == 12


def test_all_is_trained_on_where_nothing_is_held_out(store):
    config = config_for(store, validation_fraction=0.0)
    batches = train_batches(config, [store])
    # One document may be after the last window.
    assert len(seen_tokens(next(batches) for _ in range(60))) >= 59
