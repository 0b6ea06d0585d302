import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.xlstm_parallel.blocks.block import BlockCarry
from xlstm.models.xlstm_parallel.testing import lively_params, small_config
from xlstm.models.xlstm_parallel.xlstm_lm_model import (
    initial_state,
    state_specs,
    xLSTMLMModel,
)

TIME = 14
TOKENS = np.random.default_rng(0).integers(0, 11, (2, TIME))
RESET = np.isin(np.arange(TIME), (0, 5, 6)) | np.zeros((2, TIME), bool)
# Options of stacks by name. The pattern of the last one starts with two blocks of one kind.
STACKS = {
    "xlstm_7b": {},
    "xlstm_2024": {"block": "xlstm_2024"},
    "mixed": {
        "block": "xlstm_2024",
        "num_blocks": 6,
        "slstm_at": (2, 5),
        "slstm_forget_gate": "exponential",
    },
}
of_all_stacks = pytest.mark.parametrize("stack", STACKS)


def stack_config(stack, backend="fwbw", **options):
    return small_config(backend, **STACKS[stack] | options)


PARAMS = {
    stack_config(stack).model.pattern: lively_params(stack_config(stack), jax.random.key(1))
    for stack in STACKS
}


def variables_of(config):
    return {"params": PARAMS[config.model.pattern]}


def logits_of(config, tokens=TOKENS, reset=None):
    return np.asarray(_jitted_logits(config)(variables_of(config), tokens, reset))


@functools.cache
def _jitted_logits(config):
    return jax.jit(xLSTMLMModel(config).apply)


@pytest.mark.parametrize(
    "backend, stack", [*(("fwbw", stack) for stack in STACKS), ("recurrent", "xlstm_7b")]
)
def test_step_by_step_is_the_whole(backend, stack):
    config = stack_config(stack, backend)
    step = jax.jit(
        lambda token, reset, state: xLSTMLMModel(config).apply(
            variables_of(config), token, reset, state
        )
    )
    state, logits = initial_state(config, len(TOKENS)), []
    for t in range(TIME):
        new, state = step(TOKENS[:, t : t + 1], RESET[:, t : t + 1], state)
        logits.append(new)
    expected = logits_of(config, reset=RESET)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=1e-4)
    # The test can fail: without the resets the logits differ.
    assert np.abs(logits_of(config) - expected).max() > 1e-2


@of_all_stacks
def test_packed_documents_are_the_documents_alone(stack):
    config = stack_config(stack)
    packed = logits_of(config, reset=RESET)
    # Later tokens, which a document does not depend on, follow it, so that one compilation does.
    for start, end in ((0, 5), (5, 6), (6, TIME)):
        alone = logits_of(config, np.roll(TOKENS, -start, axis=1))[:, : end - start]
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)


@pytest.mark.parametrize(
    "backend, stack",
    [(backend, "xlstm_7b") for backend in ("fwbw", "parallel_stabilized", "recurrent")]
    + [("fwbw", "xlstm_2024"), ("fwbw", "mixed")],
)
def test_padding_leaves_no_trace(backend, stack):
    config = stack_config(stack, backend)
    read = jax.jit(
        lambda tokens, state, lengths: xLSTMLMModel(config).apply(
            variables_of(config), tokens, state, lengths, method="next_token_logits"
        )
    )
    lengths = np.array([6, 9])
    first = read(TOKENS, initial_state(config, 2), lengths)
    followed = read(np.roll(TOKENS, -1, axis=0), first[1], lengths)
    whole = np.zeros((2, 2 * TIME), int)  # The same tokens without padding in between.
    for row, length in enumerate(lengths):
        whole[row, : 2 * length] = np.append(TOKENS[row, :length], TOKENS[1 - row, :length])
    expected = read(whole, initial_state(config, 2), 2 * lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), followed, expected)
    np.testing.assert_allclose(first[0], logits_of(config)[np.arange(2), lengths - 1], atol=1e-4)


@of_all_stacks
def test_logits_do_not_see_the_future(stack):
    config = stack_config(stack)
    changed = TOKENS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    before, after = logits_of(config), logits_of(config, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.all(np.abs(before - after)[:, 9:].max(axis=-1) > 0)


@pytest.mark.parametrize("stack", ["xlstm_7b", "xlstm_2024"])  # Both have three blocks.
def test_bfloat16_is_near_float32(stack):
    logits = logits_of(stack_config(stack, dtype="bfloat16"))
    expected = logits_of(stack_config(stack))
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - expected) < 5e-2 * np.linalg.norm(expected)
    assert np.any(logits != expected)


@pytest.mark.parametrize("scan_unroll", [2, 5])
def test_unrolling_the_blocks_changes_nothing(scan_unroll):
    logits = logits_of(small_config(scan_unroll=scan_unroll))
    np.testing.assert_allclose(logits, logits_of(small_config()), atol=1e-5)


def test_logits_are_bounded():
    logits = logits_of(small_config(output_logit_soft_cap=0.5))
    assert 0.4 < np.abs(logits).max() <= 0.5


def test_a_mixed_stack_is_its_blocks_one_after_the_other():
    """Runs the same parameters block by block, each as its own stack."""
    config = stack_config("mixed")
    params = PARAMS[config.model.pattern]

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, blocks, x):
        variables = {"params": params | {"blocks": blocks}}
        return xLSTMLMModel(config).apply(variables, BlockCarry(x, RESET), method="_run_stages")

    x = jax.random.normal(jax.random.key(2), (2, TIME, 16))
    found, counts = run(config, params["blocks"], x), {"0_xlstm_2024": 0, "1_slstm": 0}
    for index in range(6):
        name, ratio = ("1_slstm", "[0:1]") if index in (2, 5) else ("0_xlstm_2024", "[1:0]")
        alone = stack_config("mixed", num_blocks=1, slstm_at=(), ratio=ratio)
        at, counts[name] = counts[name], counts[name] + 1
        blocks = jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], params["blocks"])
        x = run(alone, blocks[name], x)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_what_is_compiled_does_not_grow_with_the_depth():
    def size(num_blocks):
        config = small_config(ratio="[3:1]", num_blocks=num_blocks)
        model = xLSTMLMModel(config)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        return len(jax.jit(model.apply).lower({"params": params}, TOKENS).as_text())

    assert size(16) < 1.02 * size(8)


def test_initial_state_is_zero():
    C, n, m = initial_state(small_config(), 5)
    assert (C.shape, n.shape, m.shape) == ((3, 5, 2, 4, 8), (3, 5, 2, 4), (3, 5, 2))
    assert not any(np.any(x) for x in (C, n, m))
    (C, n, m), inputs = initial_state(small_config(block="xlstm_2024"), 5)
    assert (C.shape, n.shape, m.shape) == ((3, 5, 2, 16, 16), (3, 5, 2, 16), (3, 5, 2))
    assert inputs.shape == (3, 5, 3, 32)
    states = initial_state(stack_config("mixed"), 5)
    assert [x.shape for x in states["slstm"].cell] == [(2, 5, 2, 8)] * 4
    assert states["slstm"].inputs.shape == (2, 5, 3, 16)
    assert states["xlstm_2024"].inputs.shape == (4, 5, 3, 32)
    assert not any(np.any(x) for x in jax.tree.leaves(states))
    assert not any(np.any(x) for x in (C, n, m, inputs))


@of_all_stacks
def test_a_state_is_cut_over_rows_heads_and_channels(stack):
    config = stack_config(stack)
    state, specs = initial_state(config, 4), state_specs(config, ("dp", "fsdp"))
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 2), ("dp", "fsdp", "cp", "tp"))

    def check(x, spec):
        part = jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape)
        assert (part[0], part[1], np.prod(part)) == (x.shape[0], 1, x.size // 8)

    jax.tree.map(check, state, specs)


def boxes_of(config):
    init = jax.jit(xLSTMLMModel(config).init)
    variables = init(jax.random.key(0), jnp.zeros((1, 2), int))
    assert set(variables) == {"params"}
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"], is_leaf=is_box)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


BLOCK_7B = {
    "norm_mlstm.scale": ((16,), (None,)),
    "mlstm_layer.q.kernel": ((16, 8), (None, "tp")),
    "mlstm_layer.k.kernel": ((16, 8), (None, "tp")),
    "mlstm_layer.v.kernel": ((16, 16), (None, "tp")),
    "mlstm_layer.ogate_preact.kernel": ((16, 16), (None, "tp")),
    "mlstm_layer.igate_preact.kernel": ((16, 2), (None, "tp")),
    "mlstm_layer.igate_preact.bias": ((2,), ("tp",)),
    "mlstm_layer.fgate_preact.kernel": ((16, 2), (None, "tp")),
    "mlstm_layer.fgate_preact.bias": ((2,), ("tp",)),
    "mlstm_layer.multihead_norm.scale": ((16,), ("tp",)),
    "mlstm_layer.out_proj.kernel": ((16, 16), ("tp", None)),
    "norm_ffn.scale": ((16,), (None,)),
    "ffn.proj_up_gate.kernel": ((16, 48), (None, "tp")),
    "ffn.proj_up.kernel": ((16, 48), (None, "tp")),
    "ffn.proj_down.kernel": ((48, 16), ("tp", None)),
}
BLOCK_2024 = {
    "norm_mlstm.scale": ((16,), (None,)),
    "mlstm_layer.proj_up.kernel": ((16, 32), (None, "tp")),
    "mlstm_layer.proj_up_gate.kernel": ((16, 32), (None, "tp")),
    "mlstm_layer.conv.kernel": ((4, 1, 32), (None, None, "tp")),
    "mlstm_layer.conv.bias": ((32,), ("tp",)),
    "mlstm_layer.q.kernel": ((8, 4, 4), ("tp", None, None)),
    "mlstm_layer.k.kernel": ((8, 4, 4), ("tp", None, None)),
    "mlstm_layer.v.kernel": ((8, 4, 4), ("tp", None, None)),
    "mlstm_layer.igate_preact.kernel": ((3, 32, 2), (None, "tp", None)),
    "mlstm_layer.igate_preact.bias": ((2,), ("tp",)),
    "mlstm_layer.fgate_preact.kernel": ((3, 32, 2), (None, "tp", None)),
    "mlstm_layer.fgate_preact.bias": ((2,), ("tp",)),
    "mlstm_layer.multihead_norm.scale": ((32,), ("tp",)),
    "mlstm_layer.skip": ((32,), ("tp",)),
    "mlstm_layer.proj_down.kernel": ((32, 16), ("tp", None)),
}
AROUND = {
    "embeddings.embedding": ((11, 16), (("pp", "tp"), None)),
    "out_norm.scale": ((16,), (None,)),
    "lm_head.kernel": ((16, 11), (None, ("pp", "tp"))),
}


SLSTM = {
    "norm_slstm.scale": ((16,), (None,)),
    "slstm_layer.conv.kernel": ((4, 1, 16), (None, None, ("cp", "tp"))),
    "slstm_layer.conv.bias": ((16,), (("cp", "tp"),)),
    **{
        f"slstm_layer.{gate}_preact.{name}": value
        for gate in ("z", "igate", "fgate", "ogate")
        for name, value in {
            "kernel": ((2, 8, 8), (("cp", "tp"), None, None)),
            "bias": ((16,), (("cp", "tp"),)),
        }.items()
    },
    "slstm_layer.recurrent": ((2, 8, 32), (("cp", "tp"), None, None)),
    "slstm_layer.multihead_norm.scale": ((16,), (("cp", "tp"),)),
    "norm_ffn.scale": ((16,), (None,)),
    "ffn.proj_up_gate.kernel": ((16, 24), (None, "tp")),
    "ffn.proj_up.kernel": ((16, 24), (None, "tp")),
    "ffn.proj_down.kernel": ((24, 16), ("tp", None)),
}


def test_parameters_of_a_mixed_stack():
    boxes = boxes_of(stack_config("mixed"))
    found = {name: (x.value.shape, x.names) for name, x in boxes.items() if "blocks" in name}
    groups = {"0_xlstm_2024": (4, BLOCK_2024), "1_slstm": (2, SLSTM)}
    assert found == {
        f"blocks.{group}.{name}": ((count, *shape), ("pp", *axes))
        for group, (count, block) in groups.items()
        for name, (shape, axes) in block.items()
    }
    layer = "blocks.1_slstm.slstm_layer."
    bias = boxes[f"{layer}fgate_preact.bias"].value
    np.testing.assert_allclose(bias, np.tile(np.linspace(3, 6, 8), (2, 2)), rtol=1e-6)
    recurrent = boxes[f"{layer}recurrent"].value
    np.testing.assert_allclose(recurrent.std(), 1 / np.sqrt(8), rtol=0.1)
    assert np.any(recurrent[0] != recurrent[1])


@pytest.mark.parametrize("block, expected", [("xlstm_7b", BLOCK_7B), ("xlstm_2024", BLOCK_2024)])
def test_parameters(block, expected):
    boxes = boxes_of(small_config(block=block))
    assert all(isinstance(box, nn.Partitioned) for box in boxes.values())
    assert {name: (box.value.shape, box.names) for name, box in boxes.items()} == AROUND | {
        f"blocks.{name}": ((3, *shape), ("pp", *axes)) for name, (shape, axes) in expected.items()
    }
    assert {box.value.dtype for box in boxes.values()} == {np.dtype(np.float32)}


def test_initial_values():
    config = small_config(embedding_dim=128, num_heads=4, vocab_size=256, dtype="bfloat16")
    values = {name: np.asarray(box.value) for name, box in boxes_of(config).items()}
    layer = "blocks.mlstm_layer."
    small, wang = np.sqrt(2 / (5 * 128)), 2 / (3 * np.sqrt(128))
    deviations = dict.fromkeys(
        ["embeddings.embedding", "lm_head.kernel", "blocks.ffn.proj_up_gate.kernel"]
        + ["blocks.ffn.proj_up.kernel"]
        + [f"{layer}{name}.kernel" for name in ("q", "k", "v", "ogate_preact")],
        small,
    ) | dict.fromkeys([f"{layer}out_proj.kernel", "blocks.ffn.proj_down.kernel"], wang)
    for name, std in deviations.items():
        np.testing.assert_allclose(values[name].std(), std, rtol=0.03, err_msg=name)
        if name.startswith("blocks."):  # The blocks are not copies of each other.
            assert not np.allclose(values[name][0], values[name][1])
    for gate in ("igate_preact", "fgate_preact"):
        assert np.all(values[f"{layer}{gate}.kernel"] == 0)
    assert np.all(values[f"{layer}igate_preact.bias"] == -10)
    np.testing.assert_array_equal(
        values[f"{layer}fgate_preact.bias"], np.tile(np.float32([3, 4, 5, 6]), (3, 1))
    )
    for name in values:
        if name.endswith("scale"):
            assert np.all(values[name] == 1)


def test_initial_values_of_the_block_of_2024():
    config = small_config(embedding_dim=128, num_heads=4, block="xlstm_2024")
    values = {name: np.asarray(box.value) for name, box in boxes_of(config).items()}
    layer = "blocks.mlstm_layer."
    in_block = dict.fromkeys(["conv.kernel", "q.kernel", "k.kernel", "v.kernel"], 1 / np.sqrt(10))
    in_block |= dict.fromkeys(["proj_up.kernel", "proj_up_gate.kernel"], np.sqrt(2 / (5 * 128)))
    in_block |= {"proj_down.kernel": 2 / (3 * np.sqrt(128)), "igate_preact.bias": 0.1}
    for name, std in in_block.items():
        value = values[layer + name]
        np.testing.assert_allclose(value.std(), std, rtol=3 / np.sqrt(value.size), err_msg=name)
    for name in ("igate_preact.kernel", "fgate_preact.kernel", "conv.bias"):
        assert np.all(values[layer + name] == 0)
    np.testing.assert_array_equal(
        values[f"{layer}fgate_preact.bias"], np.tile(np.float32([3, 4, 5, 6]), (3, 1))
    )
    for name in ("blocks.norm_mlstm.scale", f"{layer}multihead_norm.scale", f"{layer}skip"):
        assert np.all(values[name] == 1)


def test_number_of_parameters_of_xlstm_7b():
    config = small_config(
        vocab_size=50304,
        embedding_dim=4096,
        num_blocks=32,
        num_heads=8,
        ffn_round_up_to_multiple_of=64,
    )
    shapes = jax.eval_shape(
        xLSTMLMModel(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), int)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 6_865_424_896


@of_all_stacks
def test_gradients_reach_every_parameter(stack):
    config = stack_config(stack)

    def loss(params):
        logits = xLSTMLMModel(config).apply({"params": params}, TOKENS, RESET)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    grads = jax.jit(jax.grad(loss))(PARAMS[config.model.pattern])
    grads = flax.traverse_util.flatten_dict(grads, sep=".")
    for name, grad in grads.items():
        assert np.all(np.isfinite(grad)), name
        assert np.any(grad != 0), name
