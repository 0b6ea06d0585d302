import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.sample import sample_text, without_stages
from xlstm.trainer.logger.base_logger import LoggerConfig

_MODEL = ModelConfig(
    embedding_dim=8, num_blocks=1, num_heads=1, ffn_round_up_to_multiple_of=8, vocab_size=256
)


def _config(**options):
    return RunConfig(model=_MODEL, logger=LoggerConfig(sample_temperature=0.0, **options))


@pytest.fixture(scope="module")
def params():
    """Parameters of a model that writes `ab` and ends, whatever came before the `a`.

    The head reads the last token alone: the layers before it add nothing to its embedding.
    """
    tokenizer = ByteTokenizer()
    model = xLSTMLMModel(_config().language_model)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["out_norm"]["scale"] = jax.tree.map(jnp.ones_like, params["out_norm"]["scale"])
    followers = [(tokenizer.eod_id, ord("a")), (ord("a"), ord("b")), (ord("b"), tokenizer.eod_id)]
    table = jnp.zeros((256, 8)).at[:, 7].set(1.0)  # Any other token is followed by `a`.
    head = jnp.zeros((8, 256)).at[7, ord("a")].set(1.0)
    for index, (token, follower) in enumerate(followers):
        table = table.at[token].set(jnp.zeros(8).at[index].set(1.0))
        head = head.at[index, follower].set(1.0)
    for name, kernel in (("embedding", table), ("kernel", head)):
        owner = params["embeddings" if name == "embedding" else "lm_head"]
        owner[name] = owner[name].replace(value=kernel)
    return params


@pytest.mark.parametrize(
    "prompt, num_tokens, expected",
    [
        ("", 10, "ab"),
        ("", 1, "a"),
        ("x = ", 10, "x = ab"),
        ("ab\na", 10, "ab\nab"),
        ("b", 3, "b"),
        ("é", 1, "éa"),
    ],
)
def test_the_prompt_and_what_follows_up_to_the_end(params, prompt, num_tokens, expected):
    config = _config(sample_prompt=prompt, sample_tokens=num_tokens)
    assert sample_text(config, params, ByteTokenizer()) == expected


def test_stages_share_the_blocks_differently():
    model = ModelConfig(embedding_dim=16, num_blocks=4, num_heads=2, vocab_size=256)
    lm_model = xLSTMLMModel(RunConfig(model=model).language_model)
    params = lm_model.init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mesh = create_mesh(MeshConfig(dp=1, pp=2, tp=2), jax.devices()[:4])
    moved = without_stages(params, mesh)
    jax.tree.map(np.testing.assert_array_equal, moved, unboxed(params))
    kernels = [leaf for leaf in jax.tree.leaves(moved["blocks"]) if leaf.ndim == 3]
    assert len(kernels) == 10
    for leaf in kernels:
        assert leaf.sharding.shard_shape(leaf.shape)[0] == model.num_blocks
    kernel = moved["blocks"]["mlstm_layer"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 8, 4)
    config = RunConfig(model=model, logger=LoggerConfig(sample_tokens=5))
    expected = sample_text(config, params, ByteTokenizer())
    assert sample_text(config, moved, ByteTokenizer()) == expected
