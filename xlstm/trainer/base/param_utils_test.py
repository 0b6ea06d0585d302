"""Tests of the utilities for parameter trees."""

import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import TrainState
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.param_utils import (
    count_nonfinite,
    get_grad_norms,
    get_num_params,
    get_param_mask_fn,
    get_param_norms,
    get_sharded_global_norm,
    get_sharded_norm_logits,
    is_partitioned,
    nonfinite_text,
    reboxed,
    tabulate_params,
    unboxed,
)

_SHAPES = {
    # Name of a leaf: its shape and the mesh axes it is sharded over; None for a plain leaf.
    "embeddings.embedding": ((8, 12), ("tp", None)),
    "blocks.q.kernel": ((4, 8, 8), ("pp", "fsdp", "tp")),
    "blocks.out.kernel": ((2, 16), (None, ("fsdp", "tp"))),
    "blocks.norm.scale": ((8,), (None,)),
    "head.bias": ((5,), None),
}


def _tree(make_value):
    tree = {}
    for index, (path, (shape, names)) in enumerate(_SHAPES.items()):
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        value = make_value(index, shape)
        node[name] = value if names is None else nn.Partitioned(value, names)
    return tree


def _random_tree():
    return _tree(lambda index, shape: np.random.default_rng(index).normal(size=shape))


def _values():
    return {
        path: np.random.default_rng(index).normal(size=shape)
        for index, (path, (shape, _)) in enumerate(_SHAPES.items())
    }


def _expected_norms(kind):
    norms = {f"{kind}_{path}": np.linalg.norm(value) for path, value in _values().items()}
    return {kind: np.sqrt(sum(norm**2 for norm in norms.values()))} | norms


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("get_norms, kind", [(get_grad_norms, "grad"), (get_param_norms, "param")])
@pytest.mark.parametrize("jit", [False, True])
def test_norms_of_global_arrays(get_norms, kind, jit):
    def norms(tree):
        return get_norms(tree, return_per_param=True)

    found = (jax.jit(norms) if jit else norms)(_float32(_random_tree()))
    expected = _expected_norms(f"{kind}_norm")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_only_the_global_norm_unless_asked_for_more():
    assert get_grad_norms(_float32(_random_tree())).keys() == {"grad_norm"}
    assert get_param_norms(_float32(_random_tree())).keys() == {"param_norm"}


@pytest.mark.parametrize(
    "sizes",
    [
        {"dp": 8},
        {"fsdp": 8},
        {"pp": 4, "tp": 2},
        {"fsdp": 2, "tp": 4},
        {"dp": 2, "fsdp": 2, "pp": 2},
        {"fsdp": 2, "pp": 2, "tp": 2},
    ],
    ids=str,
)
def test_norms_and_tables_of_shards_are_those_of_the_whole(sizes):
    mesh = create_mesh(MeshConfig(**{"dp": 1} | sizes))
    specs = nn.get_partition_spec(_random_tree())
    tree = reboxed(
        jax.device_put(
            unboxed(_float32(_random_tree())),
            jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
        ),
        _random_tree(),
    )

    def norms(tree):
        return get_grad_norms(tree, return_per_param=True) | get_param_norms(tree, True)

    def plain_norms(tree):
        return norms(unboxed(tree))

    def gathered_norms(tree):
        """Computes the norms of plain leaves, each gathered before."""
        return norms(jax.tree.map(_gathered, tree, is_leaf=is_partitioned))

    def on_each_device(function):
        return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)

    functions = norms, plain_norms, on_each_device(norms), on_each_device(gathered_norms)
    expected = _expected_norms("grad_norm") | _expected_norms("param_norm")
    for found in jax.jit(lambda tree: [function(tree) for function in functions])(tree):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert tabulate_params(tree) == tabulate_params(_float32(_random_tree()))
    assert get_num_params(tree) == sum(value.size for value in _values().values())


def _gathered(leaf):
    """Gathers a leaf from all devices into a plain array."""
    if not is_partitioned(leaf):
        return leaf
    value = leaf.value
    for dimension, axes in enumerate(leaf.names):
        if axes is not None:
            value = lax.all_gather(value, axes, axis=dimension, tiled=True)
    return value


def test_the_global_norm_comes_with_a_tree_of_norms():
    tree = {"a": nn.Partitioned(jnp.array([3.0, 4.0]), ("tp",)), "b": [jnp.array([[12.0]])]}
    total, per_leaf = get_sharded_global_norm(tree)
    assert float(total) == 13.0
    assert jax.tree.map(float, per_leaf) == {"a": 5.0, "b": [12.0]}


def test_squared_norms_are_summed_in_float32():
    x = jnp.full((100_000,), 0.1, jnp.bfloat16)
    squared = get_sharded_norm_logits(x)
    assert squared.dtype == jnp.float32
    np.testing.assert_allclose(squared, 1e5 * float(x[0]) ** 2, rtol=1e-4)


def test_boxes_are_taken_off_and_put_back():
    tree = _random_tree()
    plain = unboxed(tree)
    assert not any(map(is_partitioned, jax.tree.leaves(plain, is_leaf=is_partitioned)))
    doubled = reboxed(jax.tree.map(lambda x: 2 * x, plain), tree)
    assert jax.tree.structure(doubled) == jax.tree.structure(tree)
    box = doubled["embeddings"]["embedding"]
    assert is_partitioned(box) and box.names == ("tp", None)
    np.testing.assert_array_equal(box.value, 2 * _values()["embeddings.embedding"])


def test_number_of_parameters():
    assert get_num_params(_random_tree()) == 8 * 12 + 4 * 8 * 8 + 2 * 16 + 8 + 5


def test_number_of_abstract_parameters_may_be_large():
    tree = _tree(lambda _, shape: jax.ShapeDtypeStruct((*shape, 2**33), jnp.float32))
    assert get_num_params(tree) == 2**33 * (8 * 12 + 4 * 8 * 8 + 2 * 16 + 8 + 5)


def _cells(table):
    rows = [line.split() for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in _SHAPES}


def test_table_of_abstract_parameters():
    tree = _tree(lambda _, shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    table = tabulate_params(tree)
    assert table.splitlines()[-1].split() == ["total", "397"]
    assert "decay" not in table
    cells = _cells(table)
    assert cells.pop("blocks.out.kernel")[:3] == ["2x16", "32", "float32"]
    assert cells == {
        "embeddings.embedding": ["8x12", "96", "float32", "tp,-"],
        "blocks.q.kernel": ["4x8x8", "256", "float32", "pp,fsdp,tp"],
        "blocks.norm.scale": ["8", "8", "float32", "-"],
        "head.bias": ["5", "5", "float32", "replicated"],
    }


def test_table_of_seven_billion_parameters():
    d, blocks, heads, ffn, vocabulary = 4096, 32, 8, 10944, 50304
    shapes = {
        "embeddings.embedding": (vocabulary, d),
        "lm_head.kernel": (d, vocabulary),
        "out_norm.scale": (d,),
        "blocks.ffn.proj_down.kernel": (blocks, ffn, d),
        **{f"blocks.ffn.{name}.kernel": (blocks, d, ffn) for name in ("proj_up", "proj_up_gate")},
        **{f"blocks.{name}.scale": (blocks, d) for name in ("norm_mlstm", "norm_ffn", "norm_head")},
        **{f"blocks.{name}.kernel": (blocks, d, d // 2) for name in "qk"},
        **{f"blocks.{name}.kernel": (blocks, d, d) for name in ("v", "ogate", "out_proj")},
        **{f"blocks.{name}.kernel": (blocks, d, heads) for name in ("igate", "fgate")},
        **{f"blocks.{name}.bias": (blocks, heads) for name in ("igate", "fgate")},
    }
    table = tabulate_params(
        {
            name: nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), (None,) * len(shape))
            for name, shape in shapes.items()
        }
    )
    *rows, total = (line.split() for line in table.splitlines()[1:])
    assert total == ["total", "6,865,424,896"]
    counts = {name: int(count.replace(",", "")) for name, _, count, *_ in rows}
    assert counts == {name: math.prod(shape) for name, shape in shapes.items()}


def test_table_shows_long_names_whole():
    name = "layer." * 30 + "kernel"
    assert name in tabulate_params({name: jnp.zeros(3)})


def test_table_of_a_train_state_with_weight_decay():
    state = TrainState.create(
        apply_fn=None,
        params=_float32(_random_tree()),
        tx=optax.sgd(0.1),
        rng=jax.random.PRNGKey(0),
    )
    table = tabulate_params(
        state,
        show_weight_decay=True,
        weight_decay_exclude=["bias"],
        weight_decay_include=["blocks", "head"],
    )
    decayed = {name: cells[-1] for name, cells in _cells(table).items()}
    assert decayed == {
        "embeddings.embedding": "no",
        "blocks.q.kernel": "yes",
        "blocks.out.kernel": "yes",
        "blocks.norm.scale": "yes",
        "head.bias": "no",
    }


@pytest.mark.parametrize(
    "exclude, include, chosen",
    [
        (None, None, set(_SHAPES)),
        ([], None, set(_SHAPES)),
        (["bias", "norm"], None, set(_SHAPES) - {"head.bias", "blocks.norm.scale"}),
        (None, ["^blocks"], {"blocks.q.kernel", "blocks.out.kernel", "blocks.norm.scale"}),
        (None, [], set()),
        (["norm"], ["^blocks"], {"blocks.q.kernel", "blocks.out.kernel"}),
        ([r"q\.k"], ["kernel$"], {"blocks.out.kernel"}),
        (["/"], ["emb.*ing$"], {"embeddings.embedding"}),
        (["^kernel"], ["q"], {"blocks.q.kernel"}),
    ],
)
@pytest.mark.filterwarnings("ignore:the pattern")
def test_mask(exclude, include, chosen):
    tree = _random_tree()
    mask = get_param_mask_fn(exclude, include)(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    for path in _SHAPES:
        node = unboxed(mask)
        for name in path.split("."):
            node = node[name]
        assert node is (path in chosen), path


@pytest.mark.parametrize(
    "exclude, include, pattern, nearest",
    [
        (["bias", "embedings"], None, "embedings", "embeddings.embedding"),
        (["nrom"], ["^blocks"], "nrom", "blocks.norm.scale"),
        (None, [r"heads?\.biass"], r"heads?\.biass", "head.bias"),
    ],
)
def test_a_pattern_that_matches_nothing_is_reported(exclude, include, pattern, nearest):
    with pytest.warns(UserWarning) as caught:
        get_param_mask_fn(exclude, include)(_random_tree())
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith(f"the pattern {pattern!r} matches no parameter; the nearest: ")
    names = message.partition("nearest: ")[2].split(", ")
    assert names[0] == nearest
    assert len(names) == 3 and set(names) <= set(_SHAPES)


def test_a_pattern_that_matches_nothing_is_shown_once():
    mask_fn = get_param_mask_fn(["a_typo_of_this_test"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            mask_fn(_random_tree())
    assert len(caught) == 1


def test_a_tree_without_parameters_is_no_typo():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_param_mask_fn(["bias"])({"masked": optax.MaskedNode()}) is not None
        get_param_mask_fn(["bias", "norm", "embeddings"])(_random_tree())


def test_what_may_be_missing_is_no_typo():
    with pytest.warns(UserWarning) as caught:
        get_param_mask_fn(["bias", "ship", "skip"], may_be_missing=["bias", "skip"])(_random_tree())
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith("the pattern 'ship' ")


def test_mask_of_optax():
    params = _float32(_random_tree())
    decay = optax.add_decayed_weights(1.0, mask=get_param_mask_fn(["bias", "norm"]))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    norms = get_grad_norms(updates, return_per_param=True)
    for path, value in _values().items():
        expected = 0 if "bias" in path or "norm" in path else np.linalg.norm(value)
        np.testing.assert_allclose(norms[f"grad_norm_{path}"], expected, rtol=1e-6)


def test_they_are_counted_and_named():
    weights = np.ones((3, 4), np.float32)
    weights[0, 1], weights[2, 3] = np.nan, -np.inf
    params = {
        "a": {"kernel": nn.Partitioned(jnp.array(weights), ("tp", None)), "bias": jnp.ones(3)},
        "b": jnp.array([1e38, np.inf], jnp.bfloat16),
    }
    counts = count_nonfinite(params)
    assert counts == {"a.kernel": 2, "b": 1}
    assert nonfinite_text(counts) == "numbers are infinite or NaN: 2 in a.kernel, 1 in b"
    assert count_nonfinite({"a": jnp.ones(3)}) == {}


def test_a_few_stand_for_many():
    text = nonfinite_text({f"{i}\x1b": 1000 * i for i in range(1, 9)})
    assert text.startswith(r"numbers are infinite or NaN: 1,000 in 1\x1b, 2,000 in 2")
    assert text.endswith(r", 5,000 in 5\x1b and more in 3 others")
