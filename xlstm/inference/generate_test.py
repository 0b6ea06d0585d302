import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.inference.decode import read, write
from xlstm.inference.generate import WritingOptions, encode_prompt, write_texts
from xlstm.inference.load_model import LoadedModel, without_stages
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.state_file import load_progress, save_progress
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.testing.quick_compilation import QUICK_XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_XLA_FLAGS}"

CONFIG = LanguageModelConfig(
    ModelConfig(
        embedding_dim=8, num_blocks=2, num_heads=2, ffn_round_up_to_multiple_of=8, vocab_size=256
    )
)
EOD = ByteTokenizer.eod_id


def boxed_params():
    """Parameters of a model that writes `ab` and ends, whatever came before the `a`.

    The head reads the last token alone: the layers before it add nothing to its embedding.
    """
    params = xLSTMLMModel(CONFIG).init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(jnp.zeros_like, params["params"])
    params["out_norm"]["scale"] = jax.tree.map(jnp.ones_like, params["out_norm"]["scale"])
    followers = [(EOD, ord("a")), (ord("a"), ord("b")), (ord("b"), EOD)]
    table = jnp.zeros((256, 8)).at[:, 7].set(1.0)  # Any other token is followed by `a`.
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
    params = without_stages(boxed_params(), mesh)
    return LoadedModel(CONFIG, params, mesh, ByteTokenizer(), "fingerprint")


def options(num_tokens=10, **more):
    sampling = SamplingConfig(temperature=0.0, vocab_size=256)
    return WritingOptions(num_tokens, **{"sampling": sampling} | more)


def test_prompts_of_any_length_go_on_up_to_the_end(model):
    texts = ["", "x = ", "ab\na", "b", "é", "long" * 20]
    prompts = [encode_prompt(model, text) for text in texts]
    written, _ = write_texts(model, prompts, options())
    assert [x.text for x in written] == ["ab", "ab", "b", "", "ab", "ab"]
    assert {x.reason for x in written} == {"end"}
    assert written[2].ids == [ord("b"), EOD]


@pytest.mark.parametrize("token_by_token", [True, False])
def test_pieces_make_up_the_text(model, token_by_token):
    pieces, prompts = [], [encode_prompt(model, "é"), encode_prompt(model, "a")]
    written, _ = write_texts(
        model,
        prompts,
        options(2, token_by_token=token_by_token),
        on_pieces=pieces.extend,
    )
    for row, text in enumerate(written):
        assert "".join(piece for r, _, piece in pieces if r == row) == text.text
        assert sum((ids for r, ids, _ in pieces if r == row), []) == text.ids
    assert [(x.text, x.reason) for x in written] == [("ab", "length"), ("b", "end")]
    assert ([0, [ord("a")], "a"] in [list(piece) for piece in pieces]) == token_by_token


def test_a_stop_string_ends_one_text_and_not_the_other(model):
    prompts = [encode_prompt(model, "x"), encode_prompt(model, "a")]
    written, _ = write_texts(model, prompts, options(stops=("ab",)))
    assert [(x.text, x.reason) for x in written] == [("", "stop"), ("b", "end")]
    assert written[0].ids == [ord("a"), ord("b")]


def test_the_seed_and_the_number_decide_and_not_the_batch(model):
    hot = options(20, sampling=SamplingConfig(temperature=2.0), seed=3)
    prompts = [encode_prompt(model, text) for text in ("x", "yy", "x")]
    together, _ = write_texts(model, prompts, hot)
    assert together[0].ids != together[2].ids
    alone, _ = write_texts(model, prompts[2:], hot, first_number=2)
    assert alone[0].ids == together[2].ids
    other, _ = write_texts(model, prompts, dataclasses.replace(hot, seed=4))
    assert other[0].ids != together[0].ids


def test_texts_go_on_from_a_file_as_if_nothing_had_been(model, tmp_path):
    hot = options(8, sampling=SamplingConfig(temperature=2.0, repetition_penalty=1.3))
    prompts = [encode_prompt(model, "x"), encode_prompt(model, "yy")]
    expected, _ = write_texts(model, prompts, dataclasses.replace(hot, num_tokens=16))
    first, progress = write_texts(model, prompts, hot)
    path = str(tmp_path / "state")
    save_progress(path, progress, model)
    second, _ = write_texts(model, [[], []], hot, before=load_progress(path, model))
    assert [a.ids + b.ids for a, b in zip(first, second, strict=True)] == [x.ids for x in expected]
    more, _ = write_texts(
        model, [encode_prompt(model, "b", progress.states[0]), []], options(1), before=progress
    )
    assert more[0].ids == [EOD]
    assert (more[0].reason, more[0].end_token) == ("end", "\0")


def test_a_character_that_a_state_cuts_is_in_the_text_that_goes_on(model, tmp_path):
    hot, path = options(24, sampling=SamplingConfig(temperature=50.0)), str(tmp_path / "state")
    # Bytes at random make many characters of one and two bytes, and many of none.
    prompts = [[EOD, *"ä".encode()[:1]], [EOD, 0xF0]]
    cut = [dataclasses.replace(hot, num_tokens=n) for n in (1, 2, 7, 14)]
    texts, ids, before = ["", ""], [list(prompt) for prompt in prompts], None
    for part in cut:
        written, texts_so_far = write_texts(
            model, prompts, part, before=before, is_continued=part is not cut[-1]
        )
        save_progress(path, texts_so_far, model)
        prompts, before = [[], []], load_progress(path, model)
        for row, one in enumerate(written):
            texts[row] += one.text
            ids[row] += one.ids
    assert texts == [model.tokenizer.decode(row) for row in ids]


def test_states_saved_before_they_had_texts_go_on(model, tmp_path):
    _, progress = write_texts(model, [[EOD, 97]], options(2))
    path = str(tmp_path / "state")
    save_progress(path, progress, model)
    with np.load(path) as file:
        arrays = {name: array for name, array in file.items() if name != "texts"}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    (before,) = load_progress(path, model).states
    assert before == (False, b"", b"")


def test_any_of_the_ids_that_end_texts_ends_one(model):
    expected, _ = write_texts(model, [[EOD, 97]], options(3))
    end = expected[0].ids[1]
    several = dataclasses.replace(model, eos_ids=(end, 255))
    (written,), _ = write_texts(several, [[EOD, 97]], options(3))
    assert written.ids == expected[0].ids[: expected[0].ids.index(end) + 1]
    assert (written.reason, written.end_token) == ("end", chr(end))
    assert written.text == model.tokenizer.decode([97, *written.ids[:-1]])[1:]


def test_files_that_are_no_saved_state(model, tmp_path):
    _, progress = write_texts(model, [[EOD]], options(1))
    path = str(tmp_path / "state")
    save_progress(path, progress, dataclasses.replace(model, fingerprint="other"))
    with pytest.raises(ValueError, match="saved with another checkpoint .*other"):
        load_progress(path, model)
    changed = progress.progress._replace(seen=progress.progress.seen[:, :7])
    save_progress(path, progress._replace(progress=changed), model)
    with pytest.raises(ValueError, match="not a saved state of this model"):
        load_progress(path, model)
    (tmp_path / "text").write_text("nothing")
    np.savez(tmp_path / "other.npz", x=1)
    for name in ("text", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} "):
            load_progress(str(tmp_path / name), model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "its arrays are not stored as they are"),  # A small file may hold terabytes so.
        ({"logits": lambda x: np.full_like(x, np.nan)}, "it holds NaN"),
        ({"logits": lambda x: x.astype(complex)}, "its arrays are others"),
        ({"done": lambda x: x[:0]}, "its texts cannot be read"),
        ({"texts": lambda x: np.array("[" * 100_000)}, "its texts cannot be read"),
        ({"texts": lambda x: np.array("3")}, "its texts cannot be read"),
    ],
)
def test_saved_states_of_strangers(model, tmp_path, change, message):
    _, progress = write_texts(model, [[EOD]], options(1))
    path = str(tmp_path / "state")
    save_progress(path, progress, model)
    with np.load(path) as file:
        arrays = dict(file)
    arrays |= {name: function(arrays[name]) for name, function in change.items()}
    with open(path, "wb") as file:
        (np.savez if change else np.savez_compressed)(file, **arrays)
    with pytest.raises(ValueError, match=message):
        load_progress(path, model)


def test_each_program_is_compiled_once():
    mesh = create_mesh(MeshConfig(dp=2, tp=2), jax.devices()[:4])
    loaded = LoadedModel(CONFIG, without_stages(boxed_params(), mesh), mesh, None)
    sizes = [program._cache_size() for program in (read, write)]
    (text, _), _ = write_texts(loaded, [[1], [2, 3]], options(70))
    assert len(text.ids) == 70  # Three calls.
    assert [program._cache_size() for program in (read, write)] == [size + 1 for size in sizes]


@pytest.mark.parametrize("bad", [{"stops": ("",)}, {"seed": 2**32}, {"seed": -1}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=r"stop string is empty|seed=.* from 0 to 4294967295"):
        options(**bad)
    with pytest.raises(ValueError, match="num_tokens=0: it must be at least 1"):
        options(0)


def test_bad_prompts(model):
    with pytest.raises(ValueError, match="prompt 1 has the token id 256: .* from 0 to 255"):
        write_texts(model, [[0], [3, 256]], options())
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        write_texts(model, [[]], options())


def test_out_of_a_pipeline_a_model_writes_as_before(model):
    mesh = create_mesh(MeshConfig(dp=1, pp=2, tp=2), jax.devices()[:4])
    boxes = xLSTMLMModel(CONFIG).init(jax.random.PRNGKey(1), jnp.zeros((1, 1), jnp.int32))["params"]
    texts = []
    for place in (model.mesh, mesh):
        params = without_stages(boxes, place)
        loaded = LoadedModel(CONFIG, params, place, ByteTokenizer())
        texts.append(write_texts(loaded, [[EOD], [EOD, 5]], options(5))[0])
    assert texts[0] == texts[1]
    kernel = params["blocks"]["ffn"]["proj_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == 2  # All blocks, of which a part each.
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
