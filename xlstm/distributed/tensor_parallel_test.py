import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import match_varying_axes
from xlstm.distributed.tensor_parallel import (
    SCATTERED,
    column_parallel,
    cross_entropy,
    embed_tokens,
    features_to_tokens,
    gather_tokens,
    is_correct,
    local_tokens,
    row_parallel,
    scatter_features,
    scatter_tokens,
    tokens_to_features,
)

B, T, D, F, V = 2, 16, 4, 24, 32
with_and_without_check = pytest.mark.parametrize("check_vma", [True, False])
with_and_without_overlap = pytest.mark.parametrize("overlap", [True, False])
over_one_and_two_axes = pytest.mark.parametrize("axes", ["tp", ("pp", "tp")])


def assert_close(actual, expected):
    """Asserts equality up to rounding, relative to the largest element."""
    atol = 1e-5 * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def shard(fn, in_specs, out_specs, check_vma=True):
    """Returns the function on a mesh of 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), ("pp", "tp"), (AxisType.Auto,) * 2)
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


def normal(seed, *shape):
    return jnp.array(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


TOKENS = P(None, "tp")
PARAM_SPECS = {"scale": P(), "gate": P(None, "tp"), "up": P(None, "tp"), "down": P("tp")}


@pytest.fixture(scope="module")
def params():
    kernels = {"gate": normal(1, D, F), "up": normal(2, D, F), "down": normal(3, F, D)}
    return kernels | {"scale": 1 + 0.1 * normal(4, D)}


@pytest.fixture(scope="module")
def x():
    return normal(0, B, T, D)


def net(params, x, overlap=False):
    """Computes a gated feed-forward layer with a scale and a residual on local tokens."""

    def up(x):
        return {"gate": x @ params["gate"], "up": x @ params["up"]}

    def down(hidden):
        return jnp.tanh(hidden["gate"]) * hidden["up"] @ params["down"]

    hidden = column_parallel(up, x * params["scale"], "tp", overlap=overlap)
    return x + row_parallel(down, hidden, "tp", overlap=overlap)


def net_loss(params, x, overlap=False):
    outputs = net(params, x, overlap)
    return jnp.sum(jnp.sin(outputs)), outputs


def sharded_net(overlap, check_vma=True):
    """Returns gradients and outputs of the network."""

    def local(params, x):
        grads, outputs = jax.grad(net_loss, argnums=(0, 1), has_aux=True)(
            match_varying_axes(params, ["tp"]), x, overlap
        )
        grads[0]["scale"] = lax.psum(grads[0]["scale"], "tp")
        return grads, outputs

    specs = (PARAM_SPECS, TOKENS)
    return shard(local, specs, (specs, TOKENS), check_vma)


@with_and_without_check
@with_and_without_overlap
def test_a_divided_network_equals_the_whole_one(overlap, check_vma, params, x):
    actual = sharded_net(overlap, check_vma)(params, x)
    expected = jax.jit(jax.grad(net_loss, argnums=(0, 1), has_aux=True))(params, x)
    jax.tree.map(assert_close, actual, expected)


@with_and_without_overlap
def test_what_is_sent(overlap, params, x):
    program = sharded_net(overlap).lower(params, x).compile().as_text()
    assert ("collective-permute" in program) == overlap
    assert ("all-gather" in program) != overlap
    assert ("reduce-scatter" in program) != overlap


@with_and_without_overlap
def test_a_tree_of_features_for_all_tokens(overlap, x):
    kernel = normal(5, D, F)

    def local(kernel, x):
        return column_parallel(lambda x: (x @ kernel, [x > 0]), x, "tp", overlap=overlap)

    out_specs = (P(None, None, "tp"), [P("tp")])
    product, (positive,) = shard(local, (P(None, "tp"), TOKENS), out_specs)(kernel, x)
    assert_close(product, x @ kernel)
    assert positive.dtype == bool
    np.testing.assert_array_equal(positive, jnp.tile(x > 0, (4, 1, 1)))


@with_and_without_overlap
def test_what_is_kept_need_not_be_sent_again(overlap, params, x):
    """If the sum is kept, the backward pass does not repeat the row-parallel communication."""
    name = "ppermute" if overlap else "reduce_scatter"

    def count(policy):
        def local(params, x):
            loss = jax.checkpoint(lambda params, x: net_loss(params, x, overlap)[0], policy=policy)
            return jax.grad(loss)(match_varying_axes(params, ["tp"]), x)

        specs = PARAM_SPECS | {"scale": P("tp")}
        jaxpr = jax.make_jaxpr(shard(local, (PARAM_SPECS, TOKENS), specs))(params, x)
        return str(jaxpr).count(f"{name}[")

    kept = count(jax.checkpoint_policies.save_only_these_names(SCATTERED))
    assert count(jax.checkpoint_policies.nothing_saveable) == kept + (3 if overlap else 1)


def test_outside_of_shard_map_it_is_the_plain_computation(params, x):
    hidden = jnp.tanh(x * params["scale"] @ params["gate"]) * (x * params["scale"] @ params["up"])
    expected = x + hidden @ params["down"]
    for overlap in (True, False):
        assert_close(net(params, x, overlap), expected)
    for fn in (local_tokens, gather_tokens, scatter_tokens):
        np.testing.assert_array_equal(fn(x, ("pp", "tp")), x)
    np.testing.assert_array_equal(scatter_features(x, "tp"), x)
    table, tokens, logits = normal(1, V, D), jnp.arange(T)[None], normal(2, 1, T, V)
    np.testing.assert_array_equal(embed_tokens(table, tokens, "tp"), table[:T][None])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    assert_close(cross_entropy(logits, tokens, "tp"), expected)


@with_and_without_check
@over_one_and_two_axes
def test_moving_tokens(axes, check_vma, x):
    def local(x):
        x = match_varying_axes(x, [axes] if isinstance(axes, str) else axes)
        weight = 1.0 + lax.axis_index("tp")
        own = local_tokens(x, axes)
        return own, gather_tokens(own, axes)[None], scatter_tokens(x * weight, axes)

    own_specs = P(None, axes)
    run = shard(local, P(), (own_specs, P(axes), own_specs), check_vma)
    own, whole, scattered = run(x)
    np.testing.assert_array_equal(own, x)
    np.testing.assert_array_equal(whole, jnp.stack([x] * len(whole)))
    assert len(whole) == (4 if axes == "tp" else 8)
    assert_close(scattered, (1 + 2 + 3 + 4) * len(whole) / 4 * x)


@with_and_without_check
def test_a_sum_whose_features_are_divided(check_vma, x):
    kernel, weights = normal(5, D, F), normal(2, B, T, F)

    def local(kernel, x, weights):
        def loss(kernel):
            y = scatter_features(x @ kernel, "tp")
            return jnp.sum(weights * y), y

        return jax.grad(loss, has_aux=True)(kernel)

    rows, features = P("tp"), P(None, None, "tp")
    run = shard(local, (rows, features, features), (rows, features), check_vma)
    gradient, y = run(kernel, x, weights)
    assert_close(y, x @ kernel)
    assert_close(gradient, jnp.einsum("btd,btf->df", x, weights))


@pytest.fixture(scope="module")
def tokens():
    tokens = np.random.default_rng(6).integers(0, V, (B, T))
    tokens[0, :2] = 0, V - 1
    return jnp.array(tokens)


@with_and_without_check
@over_one_and_two_axes
def test_rows_of_a_divided_table(axes, check_vma, tokens):
    table, weights = normal(1, V, D), normal(2, B, T, D)

    def local(table, tokens, weights):
        def loss(table):
            rows = scatter_tokens(embed_tokens(table, tokens, axes), axes)
            return jnp.sum(weights * rows), rows

        return jax.grad(loss, has_aux=True)(table)

    own = P(None, axes)
    run = shard(local, (P(axes), P(), own), (P(axes), own), check_vma)
    gradient, rows = run(table, tokens, weights)
    np.testing.assert_array_equal(rows, table[tokens])
    assert_close(gradient, jnp.zeros((V, D)).at[tokens].add(weights))


def sharded_cross_entropy(axes, check_vma=True):
    """Returns the gradient with respect to the logits, and the negative log-likelihood."""

    def local(logits, targets, weights):
        def loss(logits):
            nll = cross_entropy(logits, targets, axes)
            return jnp.sum(weights * nll), nll

        return jax.grad(loss, has_aux=True)(logits)

    own, logits = P(None, axes), P(None, None, axes)
    return shard(local, (logits, P(), own), (logits, own), check_vma)


@jax.jit
def whole_cross_entropy(logits, targets, weights):
    def loss(logits):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * nll), nll

    return jax.grad(loss, has_aux=True)(logits)


@with_and_without_check
@over_one_and_two_axes
def test_cross_entropy_of_a_divided_vocabulary(axes, check_vma, tokens):
    inputs = 3 * normal(3, B, T, V), tokens, normal(4, B, T)
    actual = sharded_cross_entropy(axes, check_vma)(*inputs)
    jax.tree.map(assert_close, actual, whole_cross_entropy(*inputs))


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_large_logits(size, tokens):
    logits = normal(3, B, T, V).at[:, 1::2, 5].set(size).at[:, ::2].add(size / 2)
    gradient, nll = sharded_cross_entropy(("pp", "tp"))(logits, tokens, jnp.ones((B, T)))
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    assert_close(nll, expected)
    assert_close(gradient, jax.nn.softmax(logits) - jax.nn.one_hot(tokens, V))


def test_cross_entropy_of_bfloat16_logits_is_float32(tokens):
    logits = normal(3, B, T, V).astype(jnp.bfloat16)
    gradient, nll = sharded_cross_entropy("tp")(logits, tokens, jnp.ones((B, T)))
    assert gradient.dtype == jnp.bfloat16
    assert nll.dtype == jnp.float32
    expected = whole_cross_entropy(logits.astype(jnp.float32), tokens, jnp.ones((B, T)))
    assert_close(nll, expected[1])
    assert_close(gradient.astype(jnp.float32), expected[0].astype(jnp.bfloat16))


@over_one_and_two_axes
def test_tokens_are_exchanged_for_features(axes):
    x, weights = normal(0, B, T, 2 * D), normal(5, B, T, 2 * D)
    tokens, features = P(None, axes), P(None, None, axes)
    actual = shard(lambda x: tokens_to_features(x, axes), tokens, features)(x)
    np.testing.assert_array_equal(actual, x)
    back = shard(lambda x: features_to_tokens(x, axes), features, tokens)
    np.testing.assert_array_equal(back(x), x)
    grad = jax.grad(lambda x: jnp.sum(weights * back(x)))(x)
    np.testing.assert_array_equal(grad, weights)
    assert tokens_to_features(x, axes) is features_to_tokens(x, axes) is x


@over_one_and_two_axes
def test_a_target_is_predicted_if_its_logit_is_the_largest(axes):
    logits = jnp.round(normal(3, B, T, V))  # Often two are equal and largest.
    targets = jnp.argmax(logits, axis=-1).at[:, ::4].add(1) % V
    fn = shard(lambda x, y: is_correct(x, y, axes), (P(None, None, axes), P()), P(None, axes))
    first, second = np.sort(logits, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
    of_target = np.take_along_axis(np.asarray(logits), np.asarray(targets)[..., None], -1)[..., 0]
    expected = (of_target == first) & (first > second)
    np.testing.assert_array_equal(fn(logits, targets), expected)
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: features_to_tokens(x, "tp"),
        lambda x: local_tokens(x, "tp"),
        lambda x: scatter_tokens(x, "tp"),
        lambda x: row_parallel(lambda x: x, x, "tp"),
        lambda x: row_parallel(lambda x: x, x, "tp", overlap=True),
        lambda x: cross_entropy(x, jnp.zeros(x.shape[:2], int), "tp"),
    ],
)
def test_tokens_that_do_not_divide(fn):
    with pytest.raises(ValueError, match="15 tokens do not divide over the 4 devices of tp"):
        shard(fn, P(), TOKENS)(jnp.zeros((B, 15, D)))
