import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.inference.decode import decode, prefill
from xlstm.inference.generate import GenerationConfig, encode_prompt, generate_text
from xlstm.inference.loaded_model import LoadedModel, reshard_for_inference
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.state_file import load_state, save_state
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel

CONFIG = LanguageModelConfig(
    ModelConfig(
        embedding_dim=8, num_blocks=2, num_heads=2, ffn_round_up_to_multiple_of=8, vocab_size=256
    )
)
EOD = ByteTokenizer.eod_id


def boxed_params():
    """Returns parameters of a model that generates `ab` and ends, whatever precedes the `a`.

    The logits depend on the last token alone: the blocks add nothing to its embedding.
    """
    params = xLSTMLMModel(CONFIG).init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(jnp.zeros_like, params["params"])
    params["out_norm"]["scale"] = jax.tree.map(jnp.ones_like, params["out_norm"]["scale"])
    followers = [(EOD, ord("a")), (ord("a"), ord("b")), (ord("b"), EOD)]
    table = jnp.zeros((256, 8)).at[:, 7].set(1.0)  # `a` follows any other token.
    head = jnp.zeros((8, 256)).at[7, ord("a")].set(1.0)
    for index, (token, follower) in enumerate(followers):
        table = table.at[token].set(jnp.zeros(8).at[index].set(1.0))
        head = head.at[index, follower].set(1.0)
    for name, kernel in (("embedding", table), ("kernel", head)):
        owner = params["embeddings" if name == "embedding" else "lm_head"]
        owner[name] = owner[name].replace(value=kernel)
    return params


@pytest.fixture(scope="module")
def model():
    mesh = create_mesh(MeshConfig(dp=1), jax.devices()[:1])
    params = reshard_for_inference(boxed_params(), mesh)
    return LoadedModel(CONFIG, params, mesh, ByteTokenizer(), "fingerprint")


def options(max_tokens=10, **more):
    sampling = SamplingConfig(temperature=0.0, vocab_size=256)
    return GenerationConfig(max_tokens, **{"sampling": sampling} | more)


def test_prompts_of_any_length_go_on_up_to_the_end(model):
    texts = ["", "x = ", "ab\na", "b", "é", "long" * 20]
    prompts = [encode_prompt(model, text) for text in texts]
    completions, _ = generate_text(model, prompts, options())
    assert [x.text for x in completions] == ["ab", "ab", "b", "", "ab", "ab"]
    assert {x.reason for x in completions} == {"end"}
    assert completions[2].ids == [ord("b"), EOD]


@pytest.mark.parametrize("token_by_token", [True, False])
def test_pieces_make_up_the_text(model, token_by_token):
    chunks, prompts = [], [encode_prompt(model, "é"), encode_prompt(model, "a")]
    completions, _ = generate_text(
        model,
        prompts,
        options(2, token_by_token=token_by_token),
        on_chunks=chunks.extend,
    )
    for row, completion in enumerate(completions):
        assert "".join(chunk.text for chunk in chunks if chunk.row == row) == completion.text
        assert sum((chunk.ids for chunk in chunks if chunk.row == row), []) == completion.ids
    assert [(x.text, x.reason) for x in completions] == [("ab", "length"), ("b", "end")]
    assert ([0, [ord("a")], "a"] in [list(chunk) for chunk in chunks]) == token_by_token


def test_a_stop_string_ends_one_text_and_not_the_other(model):
    prompts = [encode_prompt(model, "x"), encode_prompt(model, "a")]
    completions, _ = generate_text(model, prompts, options(stop_strings=("ab",)))
    assert [(x.text, x.reason) for x in completions] == [("", "stop"), ("b", "end")]
    assert completions[0].ids == [ord("a"), ord("b")]


def test_the_seed_and_the_number_decide_and_not_the_batch(model):
    hot = options(20, sampling=SamplingConfig(temperature=2.0), seed=3)
    prompts = [encode_prompt(model, text) for text in ("x", "yy", "x")]
    together, _ = generate_text(model, prompts, hot)
    assert together[0].ids != together[2].ids
    alone, _ = generate_text(model, prompts[2:], hot, first_index=2)
    assert alone[0].ids == together[2].ids
    other, _ = generate_text(model, prompts, dataclasses.replace(hot, seed=4))
    assert other[0].ids != together[0].ids


def test_texts_go_on_from_a_file_as_if_nothing_had_been(model, tmp_path):
    hot = options(8, sampling=SamplingConfig(temperature=2.0, repetition_penalty=1.3))
    prompts = [encode_prompt(model, "x"), encode_prompt(model, "yy")]
    expected, _ = generate_text(model, prompts, dataclasses.replace(hot, max_tokens=16))
    first, state = generate_text(model, prompts, hot)
    path = str(tmp_path / "state")
    save_state(path, state, model)
    second, _ = generate_text(model, [[], []], hot, state=load_state(path, model))
    assert [a.ids + b.ids for a, b in zip(first, second, strict=True)] == [x.ids for x in expected]
    more, _ = generate_text(
        model, [encode_prompt(model, "b", state.detokenizer_states[0]), []], options(1), state=state
    )
    assert more[0].ids == [EOD]
    assert (more[0].reason, more[0].end_token) == ("end", "\0")


def test_a_character_that_a_state_cuts_is_in_the_text_that_goes_on(model, tmp_path):
    hot, path = options(24, sampling=SamplingConfig(temperature=50.0)), str(tmp_path / "state")
    # Random bytes make many characters of one and two bytes, and many invalid sequences.
    prompts = [[EOD, *"ä".encode()[:1]], [EOD, 0xF0]]
    cut = [dataclasses.replace(hot, max_tokens=n) for n in (1, 2, 7, 14)]
    texts, ids, before = ["", ""], [list(prompt) for prompt in prompts], None
    for part in cut:
        completions, state = generate_text(
            model, prompts, part, state=before, is_continued=part is not cut[-1]
        )
        save_state(path, state, model)
        prompts, before = [[], []], load_state(path, model)
        for row, completion in enumerate(completions):
            texts[row] += completion.text
            ids[row] += completion.ids
    assert texts == [model.tokenizer.decode(row) for row in ids]


def test_states_saved_before_they_had_texts_go_on(model, tmp_path):
    _, state = generate_text(model, [[EOD, 97]], options(2))
    path = str(tmp_path / "state")
    save_state(path, state, model)
    with np.load(path) as file:
        arrays = {name: array for name, array in file.items() if name != "texts"}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    (before,) = load_state(path, model).detokenizer_states
    assert before == (False, b"", b"")


def test_any_of_the_ids_that_end_texts_ends_one(model):
    expected, _ = generate_text(model, [[EOD, 97]], options(3))
    end = expected[0].ids[1]
    several = dataclasses.replace(model, eos_ids=(end, 255))
    (completion,), _ = generate_text(several, [[EOD, 97]], options(3))
    assert completion.ids == expected[0].ids[: expected[0].ids.index(end) + 1]
    assert (completion.reason, completion.end_token) == ("end", chr(end))
    assert completion.text == model.tokenizer.decode([97, *completion.ids[:-1]])[1:]


def test_files_that_are_no_saved_state(model, tmp_path):
    _, state = generate_text(model, [[EOD]], options(1))
    path = str(tmp_path / "state")
    save_state(path, state, dataclasses.replace(model, fingerprint="other"))
    with pytest.raises(ValueError, match="saved with another checkpoint: .* is other, expected"):
        load_state(path, model)
    decode_state = state.decode_state
    changed = decode_state._replace(seen=decode_state.seen[:, :7])
    save_state(path, state._replace(decode_state=changed), model)
    with pytest.raises(ValueError, match="not a saved state of this model"):
        load_state(path, model)
    (tmp_path / "text").write_text("nothing")
    np.savez(tmp_path / "other.npz", x=1)
    for name in ("text", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} "):
            load_state(str(tmp_path / name), model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "its arrays are compressed"),  # A small compressed file may expand to terabytes.
        ({"logits": lambda x: np.full_like(x, np.nan)}, "contains NaN"),
        ({"logits": lambda x: x.astype(complex)}, "its arrays have other names"),
        ({"done": lambda x: x[:0]}, "its detokenizer states cannot be read"),
        ({"texts": lambda x: np.array("[" * 100_000)}, "its detokenizer states cannot be read"),
        ({"texts": lambda x: np.array("3")}, "its detokenizer states cannot be read"),
    ],
)
def test_saved_states_of_strangers(model, tmp_path, change, message):
    _, state = generate_text(model, [[EOD]], options(1))
    path = str(tmp_path / "state")
    save_state(path, state, model)
    with np.load(path) as file:
        arrays = dict(file)
    arrays |= {name: function(arrays[name]) for name, function in change.items()}
    with open(path, "wb") as file:
        (np.savez if change else np.savez_compressed)(file, **arrays)
    with pytest.raises(ValueError, match=message):
        load_state(path, model)


def test_each_program_is_compiled_once():
    mesh = create_mesh(MeshConfig(dp=2, tp=2), jax.devices()[:4])
    loaded = LoadedModel(CONFIG, reshard_for_inference(boxed_params(), mesh), mesh, None)
    sizes = [program._cache_size() for program in (prefill, decode)]
    (completion, _), _ = generate_text(loaded, [[1], [2, 3]], options(70))
    assert len(completion.ids) == 70  # Three calls.
    assert [program._cache_size() for program in (prefill, decode)] == [size + 1 for size in sizes]


@pytest.mark.parametrize("bad", [{"stop_strings": ("",)}, {"seed": 2**32}, {"seed": -1}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=r"stop string is empty|seed=.* from 0 to 4294967295"):
        options(**bad)
    with pytest.raises(ValueError, match="max_tokens=0: it must be at least 1"):
        options(0)


def test_bad_prompts(model):
    with pytest.raises(ValueError, match="prompt 1 has the token id 256: .* from 0 to 255"):
        generate_text(model, [[0], [3, 256]], options())
    with pytest.raises(ValueError, match="prompt 0 is empty: expected"):
        generate_text(model, [[]], options())


def test_out_of_a_pipeline_a_model_writes_as_before(model):
    pipeline = create_mesh(MeshConfig(dp=1, pp=2, tp=2), jax.devices()[:4])
    boxes = xLSTMLMModel(CONFIG).init(jax.random.PRNGKey(1), jnp.zeros((1, 1), jnp.int32))["params"]
    completions = []
    for mesh in (model.mesh, pipeline):
        params = reshard_for_inference(boxes, mesh)
        loaded = LoadedModel(CONFIG, params, mesh, ByteTokenizer())
        completions.append(generate_text(loaded, [[EOD], [EOD, 5]], options(5))[0])
    assert completions[0] == completions[1]
    kernel = params["blocks"]["ffn"]["proj_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == 2  # A part of each block.
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
