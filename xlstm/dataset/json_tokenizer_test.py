import json
import re

import numpy as np
import pytest
import tokenizers

from xlstm.dataset.base_tokenizer import TokenizationError
from xlstm.dataset.json_tokenizer import JsonTokenizer, call_library
from xlstm.dataset.testing import random_text, tokenizer_families
from xlstm.dataset.tokenizer import same_tokenizer

FAMILIES = sorted(tokenizer_families())
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# They preserve texts without a leading space, so their own decoders are oracles.
LOSSLESS = [x for x in FAMILIES if x.startswith("byte_")]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return family(request.param)


def family(name, **markers):
    return JsonTokenizer(tokenizer_families()[name], name, **markers)


def changed(name, change):
    """Returns a family's tokenizer with a changed definition."""
    definition = json.loads(tokenizer_families()[name])
    change(definition)
    return JsonTokenizer(json.dumps(definition).encode(), name)


def sizes_of(tokenizer, encoded):
    """Returns the bytes of each token of each text."""
    sizes, start = [], 0
    for length in encoded.lengths:
        ids = encoded.ids[start : start + length]
        found = tokenizer.token_byte_counts[1][ids]
        found[:1] = tokenizer.token_byte_counts[0][ids[:1]]
        inside = (encoded.corrected >= start) & (encoded.corrected < start + length)
        found[encoded.corrected[inside] - start] = encoded.corrected_bytes[inside]
        sizes.append(found)
        start += length
    return sizes


def test_tokens_stand_for_all_bytes_of_a_text(tokenizer):
    rng = np.random.default_rng(0)
    texts = [random_text(rng) for _ in range(2000)]
    encoded = tokenizer.encode_batch(texts)
    assert not encoded.dropped
    assert encoded.text_bytes.tolist() == [len(text.encode()) for text in texts]
    for text, sizes in zip(texts, sizes_of(tokenizer, encoded), strict=True):
        assert (sizes >= 0).all()
        # Some have no token for only spaces, or for only U+FFFD.
        assert sizes.sum() == len(text.encode()) or not (sizes.size or text.strip(" \n\t\ufffd"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "suffix_bpe"])
def test_a_token_has_the_bytes_that_it_covers(name):
    """The library's offsets are the oracle where no character is split.

    They assign spaces to the next token; `suffix_bpe` assigns them to the previous one.
    """
    tokenizer = family(name)
    oracle = tokenizers.Tokenizer.from_str(tokenizer.definition.decode())
    oracle.post_processor = None
    for text in ("the größte café", "Stadt! cat 한국", "naïve 🌶 mat, sat"):
        encoded, expected = tokenizer.encode_batch([text]), oracle.encode(text)
        assert encoded.ids.tolist() == expected.ids
        (sizes,), stop = sizes_of(tokenizer, encoded), 0
        for i, (start, end) in enumerate(expected.offsets):
            is_cut = (i, start) != (0, 0) and start < stop
            later = expected.offsets[i + 1][0] if i + 1 < len(expected.offsets) else len(text)
            if not is_cut and later >= end and end > stop:
                assert sizes[i] == len(text[stop:end].encode()), (text, i)
            stop = max(stop, end)


def test_no_text_yields_a_special_token(tokenizer):
    rng = np.random.default_rng(1)
    texts = [random_text(rng) for _ in range(1000)]
    encoded = tokenizer.encode_batch([*texts, *SPECIAL, "".join(SPECIAL) * 3])
    found = {tokenizer.id_to_token(int(i)) for i in np.unique(encoded.ids)}
    assert not found & set(SPECIAL[1:])


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_is_spelled_out_is_text(name):
    tokenizer = family(name)
    for text in (*SPECIAL, "a<s>b</s>c<pad>d", "<<s>s>", "x <0x41> <0xe0> y", "<0x41><0x42>"):
        found = tokenizer.decode(tokenizer.encode("a" + text))
        assert found.lstrip(" ") == "a" + text


@pytest.mark.parametrize("name", LOSSLESS)
def test_decoding_is_that_of_the_library_where_it_is_right(name):
    tokenizer, rng = family(name), np.random.default_rng(2)
    oracle = tokenizers.Tokenizer.from_str(tokenizer.definition.decode())
    for _ in range(500):
        text = random_text(rng).replace("\ufffd", "").lstrip(" ▁")
        ids = tokenizer.encode(text)
        expected = oracle.decode(ids.tolist(), skip_special_tokens=True)
        assert "\ufffd" not in expected
        assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_any_ids_is_that_of_the_library_but_for_broken_bytes(name):
    tokenizer, rng, compared = family(name), np.random.default_rng(3), 0
    oracle = tokenizers.Tokenizer.from_str(tokenizer.definition.decode())
    for _ in range(500):
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 9)).tolist()
        expected = oracle.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in expected:
            assert tokenizer.decode(ids) == expected
            compared += 1
    assert compared > 50


def test_a_run_of_bytes_is_read_as_utf8():
    tokenizer = family("byte_fallback_bpe")
    vocab = json.loads(tokenizer.definition)["model"]["vocab"]
    ids = [vocab[f"<0x{byte:02X}>"] for byte in b"\xe4\xbd\xa0\xe5\xa5"]
    # The library decodes it as five U+FFFD.
    assert tokenizer.decode(ids) == "你\ufffd"


def test_unknown_tokens_are_counted_and_have_the_bytes_of_what_they_stand_for():
    tokenizer = family("metaspace_unigram")
    encoded = tokenizer.encode_batch(["the cat", "한국 the 🌶", "the"])
    assert encoded.num_unknown == 2
    (_, sizes, _) = sizes_of(tokenizer, encoded)
    assert sorted(sizes)[-2:] == [4, 6]
    # Spelled out, it is text; of its letters, the vocabulary has only n.
    assert "n" in tokenizer.decode(tokenizer.encode("a<unk>c"))


def without_unknown(name):
    def change(definition):
        definition["model"]["unk_token"] = None
        definition["model"]["byte_fallback"] = False

    return changed(name, change)


def test_characters_without_a_token_are_told():
    tokenizer = without_unknown("byte_fallback_bpe")
    texts = ["the cat", "the XÄ cat Ä", "한국"]
    encoded = tokenizer.encode_batch(texts)
    known = {x for x in json.loads(tokenizer.definition)["model"]["vocab"] if len(x) == 1} | {" "}
    expected = ["".join(c for c in text if c not in known) for text in texts]
    assert expected == ["", "XÄÄ", "한국"]
    assert encoded.dropped == {1: "XÄÄ", 2: "한국"}
    assert encoded.lengths[2] == 0 or encoded.text_bytes[2] == 6
    with pytest.raises(ValueError, match=r"no token for 'X' \(U\+0058\), 'Ä' \(U\+00C4\)$"):
        tokenizer.encode("the XÄ cat")


def test_characters_without_a_token_at_the_end_of_words_are_told():
    tokenizer = without_unknown("suffix_bpe")
    vocab = json.loads(tokenizer.definition)["model"]["vocab"]
    text = "the cat xcaty Q"
    expected = ""
    for word in text.split():
        expected += "".join(c for c in word[:-1] if c not in vocab)
        expected += word[-1] if word[-1] + "</w>" not in vocab else ""
    assert "Q" in expected
    assert sorted(tokenizer.encode_batch([text]).dropped[0]) == sorted(expected)


def test_bytes_without_a_token_are_told():
    def change(definition):
        for letter in "AÃ":  # The letters of A and of the first byte of ä.
            del definition["model"]["vocab"][letter]
        used = "AÃ"
        merges = definition["model"]["merges"]
        kept = [pair for pair in merges if not set(used) & set("".join(pair))]
        definition["model"]["merges"] = kept

    tokenizer = changed("byte_level", change)
    assert tokenizer.encode_batch(["cat", "A cät A"]).dropped == {1: "AäA"}
    assert not tokenizer.is_lossless


def test_what_no_model_can_encode_is_refused():
    def change(definition):
        definition["model"]["unk_id"] = None

    tokenizer = changed("metaspace_unigram", change)
    with pytest.raises(
        TokenizationError, match="metaspace_unigram cannot encode the text: "
    ) as error:
        tokenizer.encode_batch(["the", "cat", "한국", "한국"])
    assert error.value.index == 2


def test_characters_without_a_token_are_those_that_the_library_leaves_out():
    """For any normalizers and added tokens."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    kinds = [
        (None, {}, "aZb Z", "Z"),  # Matched only as a whole word.
        (None, {"rstrip": True, "single_word": False}, "aZ b", ""),
        (tokenizers.normalizers.Lowercase(), {}, "A B", ""),
        (tokenizers.normalizers.NFD(), {}, "bä", "ä"),
    ]
    for normalizer, flags, text, expected in kinds:
        vocab = {"a": 0, "b": 1, "</s>": 2, " ": 3}
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        if normalizer:
            inner.normalizer = normalizer
        inner.add_tokens([tokenizers.AddedToken("Z", **{"single_word": True} | flags)])
        encoded = JsonTokenizer(inner.to_str().encode(), "x").encode_batch([text])
        assert encoded.dropped.get(0, "") == expected
    # A byte that a normalizer adds.
    vocab = {letter: i for i, letter in enumerate(x for x in letters if x != "Ì")} | {"</s>": 300}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.normalizer = tokenizers.normalizers.NFD()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    assert JsonTokenizer(inner.to_str().encode(), "x").encode_batch(["é", "e"]).dropped.keys() == {
        0
    }


def test_files_without_newer_fields(tokenizer):
    definition = json.loads(tokenizer.definition)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "truncation", "padding"):
        if definition[part] is None:
            del definition[part]
    del definition["model"]["type"]
    older = JsonTokenizer(json.dumps(definition).encode(), "older")
    for text in ("the cat", "größte <s> 한국"):
        assert older.encode(text).tolist() == tokenizer.encode(text).tolist()
        ids = older.encode_continuation(text).tolist()
        assert ids == tokenizer.encode_continuation(text).tolist()


def test_whatever_the_library_raises_is_told():
    class Panic(BaseException):
        """A panic, which like the library's is not an `Exception`."""

    def fail():
        raise Panic("it panicked")

    with pytest.raises(ValueError, match="it panicked"):
        call_library(fail)


def test_added_tokens_that_the_library_finds_in_no_certain_way_are_refused():
    def add(*contents):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="</s>"))
        inner.normalizer = tokenizers.normalizers.BertNormalizer()
        inner.add_tokens(list(contents))
        return JsonTokenizer(inner.to_str().encode(), "words.json")

    with pytest.raises(ValueError, match=r"words.json: the added token '\\x01' is empty"):
        add("\x01")
    with pytest.raises(ValueError, match="added tokens 'Ab' and 'ab' are equal once normalized"):
        add("Ab", "ab")
    add("Ab", "b")


def test_affixes_that_are_spelled_as_bytes():
    vocab = {"a": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, end_of_word_suffix="</w>")
    tokenizer = JsonTokenizer(tokenizers.Tokenizer(model).to_str().encode(), "x")
    encoded = tokenizer.encode_batch(["x"])
    assert sizes_of(tokenizer, encoded)[0].sum() == 1


def test_byte_tokens_are_not_found_in_a_text_by_a_bpe_either():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"</s>": 256}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, ignore_merges=True)
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.ByteFallback()
    tokenizer = JsonTokenizer(inner.to_str().encode(), "x")
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_a_token_without_text_behind_others_has_one_in_front():
    model = tokenizers.models.WordPiece({"[UNK]": 0, "</s>": 1, "##": 2, "hello": 3})
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.WordPiece()
    tokenizer = JsonTokenizer(inner.to_str().encode(), "x")
    assert tokenizer.decode([2, 3]) == inner.decode([2, 3]) == "## hello"


@pytest.mark.parametrize("name", ["byte_level", *(x for x in FAMILIES if x != "byte_level")])
def test_only_a_plain_byte_level_vocabulary_is_lossless(name):
    assert family(name).is_lossless == (name == "byte_level")
    inner = tokenizers.Tokenizer.from_str(tokenizer_families()[name].decode())
    inner.decoder = tokenizers.decoders.ByteLevel()
    changed_decoder = JsonTokenizer(inner.to_str().encode(), name)
    assert changed_decoder.is_lossless == (name == "byte_level")


def test_a_special_token_of_one_letter_is_told_where_a_text_has_it():
    def change(definition):
        vocab = definition["model"]["vocab"]
        (index,) = [i for i, (piece, _) in enumerate(vocab) if piece == "t"]
        entry = {**definition["added_tokens"][1], "content": "t", "id": index}
        definition["added_tokens"].append(entry)

    encoded = changed("metaspace_unigram", change).encode_batch(["e t e"])
    assert encoded.dropped == {0: "t"}


def test_a_marker_that_is_an_ordinary_added_token_is_text_in_a_text():
    def change(definition):
        definition["added_tokens"][1]["special"] = False

    for name in LOSSLESS:
        tokenizer = changed(name, change)
        assert tokenizer.eod_token == "</s>"
        text = "a</s>b"
        assert tokenizer.eod_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)).lstrip() == text


def test_added_tokens_beyond_ascii_are_what_they_are():
    def add(definition):
        shape = {**definition["added_tokens"][0], "special": False}
        definition["added_tokens"].append({**shape, "id": 1000, "content": "café"})

    tokenizer = changed("byte_level", add)
    # The library assigns the next id, whatever the file says.
    token_id = tokenizer.vocab_size - 1
    encoded = tokenizer.encode_batch(["un café !"])
    assert encoded.ids.tolist().count(token_id) == 1
    assert tokenizer.decode(encoded.ids) == "un café !"
    (sizes,) = sizes_of(tokenizer, encoded)
    assert sizes.sum() == 10 and tokenizer.token_byte_counts[1][token_id] == 5

    def add_a_byte(definition):
        shape = {**definition["added_tokens"][0], "special": False}
        byte_id = definition["model"]["vocab"]["é"]  # The letter of the byte E9.
        definition["added_tokens"].append({**shape, "id": byte_id, "content": "é"})

    with pytest.raises(ValueError, match="added token 'é' is also a token of the byte-level"):
        changed("byte_level", add_a_byte).decode([5])


def test_a_decoder_that_merges_tokens_is_refused():
    def change(definition):
        definition["decoder"] = json.loads(tokenizers.decoders.CTC().__getstate__())

    with pytest.raises(ValueError, match="the decoder CTC is not supported"):
        changed("metaspace_unigram", change).decode([1])


def test_truncation_padding_dropout_and_templates_change_no_ids(tokenizer):
    inner = tokenizers.Tokenizer.from_str(tokenizer.definition.decode())
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    inner.post_processor = template
    if hasattr(inner.model, "dropout"):
        inner.model.dropout = 0.5
    saved = JsonTokenizer(inner.to_str().encode(), "saved")
    text = "the cat sat on the größte mat " * 5
    assert saved.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert same_tokenizer(saved, tokenizer)


def test_identity(tokenizer):
    definition = json.loads(tokenizer.definition)
    again = JsonTokenizer(json.dumps(definition, indent=4, sort_keys=True).encode(), "again")
    assert again.fingerprint != tokenizer.fingerprint
    assert same_tokenizer(again, tokenizer)
    # With another marker or token, it is another tokenizer.
    other = JsonTokenizer(tokenizer.definition, "other", "<pad>")
    assert not same_tokenizer(other, tokenizer)
    other = JsonTokenizer(tokenizer.definition, "other", None, "<s>")
    assert not same_tokenizer(other, tokenizer)
    (content,) = {x["content"] for x in definition["added_tokens"] if x["content"] == "<pad>"}
    renamed = re.sub(re.escape(content), "<fill>", tokenizer.definition.decode())
    assert not same_tokenizer(JsonTokenizer(renamed.encode(), "renamed"), tokenizer)


def test_a_continuation_has_no_space_in_front():
    for name in LOSSLESS:
        tokenizer = family(name)
        ids = [*tokenizer.encode("the cat"), *tokenizer.encode_continuation("s sat")]
        assert tokenizer.decode(ids).lstrip() == "the cats sat"
