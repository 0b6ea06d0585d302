"""Tests of importing and exporting models in the Hugging Face format, with real files."""

import json
import os
import shutil
import tempfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xlstm.dataset.testing import write_tokenizer_json
from xlstm.files import read_json
from xlstm.huggingface import convert, layout
from xlstm.huggingface.convert import export_model, import_model
from xlstm.huggingface.safetensors_files import write_json
from xlstm.huggingface.tokenizer import write_byte_tokenizer_files
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.testing.full_disk import full_disk
from xlstm.trainer.checkpoints.folder import CheckpointFolder, CheckpointGone
from xlstm.trainer.checkpoints.read_params import open_params, read_run_info
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.workdir import Workdir

# A copy, since Bazel's test data are links to the checkout.
_FOLDER = tempfile.TemporaryDirectory()
_GOLDEN = shutil.copytree(
    os.path.join(os.path.dirname(layout.__file__), "testdata", "hf_xlstm_tiny"),
    os.path.join(_FOLDER.name, "hf_xlstm_tiny"),
)
_SMALL = ModelConfig(
    vocab_size=300, embedding_dim=16, num_blocks=3, num_heads=2, ffn_round_up_to_multiple_of=8
)


def _ignore(done, total):
    pass


def _write_model(folder, model=_SMALL):
    """Writes a random model in the Hugging Face format."""
    rng = np.random.default_rng(0)
    tensors = layout.hf_tensors(layout.parameter_shapes(model))
    arrays = {x.name: rng.standard_normal(x.shape, dtype=np.float32) for x in tensors}
    os.makedirs(folder)
    save_file(arrays, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = layout.to_hf_config(model, BackendConfig(chunk_size=32), "float32")
    write_json(os.path.join(folder, "config.json"), config | {"eos_token_id": 5})
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with imports of the golden model and of a small model with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    import_model(_GOLDEN, str(folder / "golden"), _ignore)
    _write_model(folder / "small_hf")
    write_tokenizer_json(str(folder / "small_hf" / "tokenizer.json"), words=["one", "two"])
    write_json(str(folder / "small_hf" / "generation_config.json"), {"top_k": 3, "pad_token_id": 1})
    import_model(str(folder / "small_hf"), str(folder / "small"), _ignore)
    return folder


def _export(folder, name, target, **options):
    """Exports a run; returns the summary and the reports of the progress."""
    workdir, reports = Workdir(str(folder / name)), []
    options = {"dtype": "float32", "max_shard_bytes": 10**9} | options
    saved = read_run_info(workdir.checkpoints, 0)["config"]
    config = RunConfig(ModelConfig(**saved["model"]), BackendConfig(**saved["backend"]))
    summary = export_model(
        config, workdir, 0, str(target), lambda *numbers: reports.append(numbers), **options
    )
    return summary, reports


def test_a_hugging_face_model_is_the_folder_of_a_run(folder):
    workdir = Workdir(str(folder / "golden"))
    info = read_run_info(workdir.checkpoints, 0)
    assert info["corpora"] == [] and info["tokenizer"] is None
    assert info["config"]["model"]["embedding_dim"] == 128
    assert info["config"]["backend"]["chunk_size"] == 16
    assert read_json(workdir.config) == {"config": info["config"], "corpora": []}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    assert read_json(str(folder / "golden" / "generation_config.json")) == ids
    model = ModelConfig(**info["config"]["model"])
    shapes = layout.parameter_shapes(model)
    params = open_params(workdir.checkpoints, 0, shapes)
    hf_model = load_file(os.path.join(_GOLDEN, "model.safetensors"))
    kernel = params["blocks.ffn.proj_up.kernel"]
    for block in range(2):
        expected = hf_model[f"backbone.blocks.{block}.ffn.proj_up.weight"].T
        np.testing.assert_array_equal(kernel[block].read().result(), expected)
        assert kernel.chunk_layout.read_chunk.shape == (1, 128, 128)
    embedding = params["embeddings.embedding"].read().result()
    np.testing.assert_array_equal(embedding, hf_model["backbone.embeddings.weight"])


@pytest.mark.parametrize("name, source", [("golden", _GOLDEN), ("small", None)])
def test_what_was_imported_is_exported_bit_by_bit(folder, tmp_path, name, source):
    source = source or str(folder / f"{name}_hf")
    summary, reports = _export(folder, name, tmp_path / "back")
    expected = load_file(os.path.join(source, "model.safetensors"))
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, array in found.items():
        assert array.shape == expected[tensor].shape
        assert array.tobytes() == expected[tensor].tobytes()
    num_parameters = sum(array.size for array in expected.values())
    assert (summary.num_parameters, summary.num_files) == (num_parameters, 1)
    assert summary.num_bytes == 4 * num_parameters
    assert len(reports) == len(expected) and reports[-1] == (num_parameters, num_parameters)
    before = read_json(os.path.join(source, "config.json"))
    after = read_json(str(tmp_path / "back" / "config.json"))
    # All fields but those that only `transformers` uses.
    others = {"transformers_version", "max_inference_chunksize", "pad_token_id"}
    others |= {"tie_word_embeddings", "add_out_norm", "return_last_states"}
    others |= {"chunkwise_kernel", "sequence_kernel", "step_kernel", "inference_state_dtype"}
    assert {x: y for x, y in before.items() if x not in others} == {
        x: y for x, y in after.items() if x not in others
    }


def test_tied_embeddings_that_are_not(tmp_path):
    """`transformers` ignores this field: the tensors decide."""
    shutil.copytree(_GOLDEN, tmp_path / "hf_model")
    _change_json("config.json", tie_word_embeddings=True)(tmp_path / "hf_model")
    summary = import_model(str(tmp_path / "hf_model"), str(tmp_path / "run"), _ignore)
    (note,) = summary.notes
    assert note.startswith("tie_word_embeddings=True has no effect")
    _export(tmp_path, "run", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]
    expected = load_file(os.path.join(_GOLDEN, "model.safetensors"))
    assert found.tobytes() == expected["lm_head.weight"].tobytes()
    assert found.tobytes() != expected["backbone.embeddings.weight"].tobytes()
    assert "tie_word_embeddings" not in read_json(str(tmp_path / "back" / "config.json"))


def test_the_tokenizer_comes_along(folder, tmp_path):
    source = folder / "small_hf"
    _export(folder, "small", tmp_path / "back")
    for name in ("small", tmp_path / "back"):
        content = (folder / name / "tokenizer.json").read_bytes()
        assert content == (source / "tokenizer.json").read_bytes()
        # Ids from `config.json` are kept, too.
        generation = read_json(str(folder / name / "generation_config.json"))
        assert generation == {"top_k": 3, "pad_token_id": 1, "eos_token_id": 5}
    found = read_run_info(str(folder / "small" / "checkpoints"), 0)["tokenizer"]
    assert found.startswith("sha256:")
    assert read_json(str(tmp_path / "back" / "config.json"))["eos_token_id"] == 5


def test_several_files_of_half_the_size(folder, tmp_path):
    options = {"dtype": "bfloat16", "max_shard_bytes": 10_000}
    summary, _ = _export(folder, "small", tmp_path / "half", **options)
    files = sorted((tmp_path / "half").glob("*.safetensors"))
    assert summary.num_files == len(files) > 2
    assert summary.num_bytes == 2 * summary.num_parameters
    found = {}
    for file in files:
        found |= load_file(file)
    expected = load_file(folder / "small_hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, expected[name].astype(ml_dtypes.bfloat16))
    assert read_json(str(tmp_path / "half" / "config.json"))["dtype"] == "bfloat16"
    # The import is float32.
    import_model(str(tmp_path / "half"), str(tmp_path / "run"), _ignore)
    shapes = layout.parameter_shapes(_SMALL)
    params = open_params(str(tmp_path / "run" / "checkpoints"), 0, shapes)
    rounded = expected["lm_head.weight"].T.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["lm_head.kernel"].read().result(), rounded)


def test_a_model_of_bytes(folder, tmp_path):
    """A byte tokenizer is a file in the Hugging Face format only, and is recognized."""
    _write_model(tmp_path / "bytes_hf")
    write_byte_tokenizer_files(str(tmp_path / "bytes_hf"))
    import_model(str(tmp_path / "bytes_hf"), str(tmp_path / "run"), _ignore)
    assert read_run_info(str(tmp_path / "run" / "checkpoints"), 0)["tokenizer"] == "byte"
    # As in a run that was trained here.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        os.remove(tmp_path / "run" / name)
    _export(tmp_path, "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (tmp_path / "back" / name).read_bytes()
        assert content == (tmp_path / "bytes_hf" / name).read_bytes()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert ids.items() <= read_json(str(tmp_path / "back" / "config.json")).items()
    assert read_json(str(tmp_path / "back" / "generation_config.json")) == ids


def _change_json(name, **changes):
    def change(folder):
        path = os.path.join(folder, name)
        write_json(path, (read_json(path) if os.path.exists(path) else {}) | changes)

    return change


def _write(name, content):
    return lambda folder: (folder / name).write_text(content)


def _drop_tensor(folder, name="backbone.blocks.1.norm_ffn.weight"):
    arrays = load_file(folder / "model.safetensors")
    del arrays[name]
    save_file(arrays, folder / "model.safetensors")


def _tie(folder):
    _drop_tensor(folder, "lm_head.weight")
    _change_json("config.json", tie_word_embeddings=True)(folder)


def _link(name, target="../secret.json"):
    """Replaces a file by a link to a valid file outside of the model's folder."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(folder / target, (folder / name).parent))

    return change


def _number(name, value):
    return _change_json(
        "config.json", **{name: value, "num_hidden_layers": None, "hidden_size": None}
    )


_BAD_MODELS = {
    "a million blocks": (_number("num_blocks", 10**6), r"num_blocks=1000000 with .* is too large"),
    "a wide model": (_number("embedding_dim", 10**9), "embedding_dim=1000000000 is too large"),
    "many ids": (_number("vocab_size", 10**12), "vocab_size=1000000000000 with .* is too large"),
    "rounding": (_number("ffn_round_up_to_multiple_of", 10**12), "multiple_of=.* is too large"),
    "a factor": (
        _number("ffn_proj_factor", 1e308),
        r"ffn_proj_factor=1e\+308 with .* is too large",
    ),
    "negative": (_number("num_blocks", -1), "num_blocks=-1: it must be at least 1"),
    "zero": (_number("embedding_dim", 0), "embedding_dim=0: it must be at least 1"),
    "fraction": (_number("num_heads", 4.0), "num_heads=4.0 is not supported: expected int"),
    "truth": (_number("num_heads", True), "num_heads=True is not supported: expected int"),
    "text": (_number("vocab_size", "61"), "vocab_size='61' is not supported: expected int"),
    "null": (_number("vocab_size", None), "vocab_size is None: expected a number"),
    "list": (_number("num_blocks", [2] * 99), r"num_blocks=\[2, 2.*\.\.\.\] is not supp"),
    "not a number": (
        _number("norm_eps", float("nan")),
        "norm_eps=nan is not supported: it must be",
    ),
    "infinite": (_number("qk_dim_factor", float("inf")), "qk_dim_factor=inf is not supported"),
    "long number": (_number("v_dim_factor", 10**400), "v_dim_factor=1000.* expected float"),
    "outside configuration": (_link("config.json"), "config.json is a link that leads out of"),
    "outside tensors": (_link("model.safetensors"), "safetensors is a link that leads out of"),
    "outside generation": (_link("generation_config.json"), "_config.json is a link that leads"),
    "outside tokenizer": (_link("tokenizer.json"), "tokenizer.json is a link that leads out"),
    "outside template": (_link("chat_template.jinja"), "template.jinja is a link that leads out"),
    "outside map": (_link("special_tokens_map.json"), "tokens_map.json is a link that leads out"),
    "outside folder": (_link("additional_chat_templates", ".."), "templates is a link that leads"),
    "outside in a folder": (
        _link("additional_chat_templates/x"),
        "templates/x is a link that leads",
    ),
    "link to a folder": (
        _link("additional_chat_templates/x", "additional_chat_templates"),
        "link to a folder|leads out",
    ),
    "ids": (
        _change_json("generation_config.json", eos_token_id="x"),
        r"model has eos_token_id=\['x'\]: expected ids",
    ),
}


@pytest.mark.parametrize("name", _BAD_MODELS)
def test_a_model_that_cannot_be_used_leaves_nothing(tmp_path, name):
    change, message = _BAD_MODELS[name]
    shutil.copytree(_GOLDEN, tmp_path / "model")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "secret.json")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        import_model(str(tmp_path / "model"), str(tmp_path / "run"), _ignore)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    assert sorted(os.listdir(tmp_path)) == ["model", "secret.json"]


def test_numbers_that_are_not_finite_are_told_or_refused(tmp_path):
    shutil.copytree(_GOLDEN, tmp_path / "model")
    arrays = load_file(tmp_path / "model" / "model.safetensors")
    arrays["lm_head.weight"][1, 2:4] = np.nan, np.inf
    save_file(arrays, tmp_path / "model" / "model.safetensors")
    text = "numbers are infinite or NaN: 2 in lm_head.weight"
    source, target = str(tmp_path / "model"), str(tmp_path / "run")
    with pytest.raises(ValueError, match=f"model: {text}$"):
        import_model(source, target, _ignore, refuse_nonfinite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert text in import_model(source, target, _ignore).notes
    with pytest.raises(ValueError, match=f"run: {text}$"):
        _export(tmp_path, "run", tmp_path / "back", refuse_nonfinite=True)
    summary, _ = _export(tmp_path, "run", tmp_path / "back")
    assert summary.notes == (text,)
    found = load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(found, arrays["lm_head.weight"])


def test_a_model_in_the_cache_of_the_hub(tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(_GOLDEN, cache / "blobs")
    snapshot.mkdir(parents=True)
    for name in os.listdir(cache / "blobs"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    import_model(str(snapshot), str(tmp_path / "run"), _ignore)
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_leaves_nothing(folder, tmp_path, direction):
    with pytest.raises(OSError, match="written.*File too large"), full_disk(10_000):
        if direction == "import":
            import_model(_GOLDEN, str(tmp_path / "run"), _ignore)
        else:
            _export(folder, "golden", tmp_path / "model")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path, is_exported", [("run", True), ("run/checkpoints/7", False)])
def test_a_checkpoint_that_its_run_removes_while_it_is_exported(
    folder, tmp_path, monkeypatch, path, is_exported
):
    run = shutil.copytree(folder / "small", tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "7")
    read_slice, reads = convert._read_slice, []

    def remove_and_read(arrays, tensor):
        reads.append(tensor.name)
        if len(reads) == 3:
            CheckpointFolder(str(run / "checkpoints")).remove([7])
        return read_slice(arrays, tensor)

    monkeypatch.setattr(convert, "_read_slice", remove_and_read)

    def export(workdir, step):
        return export_model(
            RunConfig(model=_SMALL),
            workdir,
            step,
            str(tmp_path / "exported"),
            _ignore,
            dtype="float32",
            max_shard_bytes=10**9,
        )

    if is_exported:
        read_checkpoint(str(tmp_path / path), export)
        assert reads.count(reads[0]) == 2  # It started again.
        found = load_file(tmp_path / "exported" / "model.safetensors")
        expected = load_file(folder / "small_hf" / "model.safetensors")
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    else:
        with pytest.raises(CheckpointGone, match="there is no checkpoint of step 7 in"):
            read_checkpoint(str(tmp_path / path), export)
        assert sorted(os.listdir(tmp_path)) == ["run"]


def test_what_cannot_be_exported(folder, tmp_path):
    with pytest.raises(ValueError, match="small exists already"):
        _export(folder, "small", folder / "small")
    workdir = Workdir(str(folder / "small"))
    options = {"dtype": "float32", "max_shard_bytes": 10**9}
    arguments = (workdir, 0, str(tmp_path / "model"), _ignore)
    with pytest.raises(ValueError, match="stabilize_correctly=False"):
        unbounded = RunConfig(_SMALL, BackendConfig(stabilize_correctly=False))
        export_model(unbounded, *arguments, **options)
    with pytest.raises(OSError, match="checkpoint of step 0 .* is of shape .* in the checkpoint"):
        export_model(RunConfig(), *arguments, **options)
    shutil.copytree(folder / "small", tmp_path / "other")
    write_tokenizer_json(str(tmp_path / "other" / "tokenizer.json"), words=["other"])
    with pytest.raises(ValueError, match="not the tokenizer of the run"):
        _export(tmp_path, "other", tmp_path / "model")
    assert os.listdir(tmp_path) == ["other"]
    assert json.loads((folder / "small" / "config.json").read_text())["corpora"] == []
