import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.optimizer.optimizers import OptimizerConfig, create_optimizer

_SHAPES = {
    # Name of a parameter: its shape and its partition spec.
    "blocks.ffn.proj_up.kernel": ((2, 128, 130), P("pp", "fsdp", "tp")),  # Adafactor factors it.
    "blocks.ffn.proj_down.kernel": ((2, 6, 4), P("pp", "tp", "fsdp")),
    "blocks.igate_preact.bias": ((2, 4), P("pp", "tp")),
    "blocks.norm_ffn.scale": ((2, 4), P("pp", None)),
    "embeddings.embedding": ((8, 4), P(("pp", "tp"), None)),
    "lm_head.kernel": ((4, 8), P(None, "tp")),
    "out_norm.scale": ((4,), P(None)),
}
_NUM_STEPS = 4
_LEARNING_RATE = 0.05
_CONFIGS = {
    "adamw": OptimizerConfig(),
    "lion": OptimizerConfig(name="lion", beta2=0.98),
    "adafactor": OptimizerConfig(name="adafactor"),
    "muon": OptimizerConfig(name="muon"),
    "sgd": OptimizerConfig(name="sgd", momentum=0.8),
    "sgd_plain": OptimizerConfig(name="sgd", momentum=0.8, nesterov=False),
    "ademamix": OptimizerConfig(name="ademamix", beta3=0.99, ademamix_warmup_steps=3),
}
_NAMES = [name for name, config in _CONFIGS.items() if name == config.name]


def _nested(leaves):
    """Returns a tree of leaves that are given by name."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def _random(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in _SHAPES.items()}


def _gradients():
    """Returns the gradients of all steps, stacked on a new leading axis."""
    seeds = range(1, _NUM_STEPS + 1)
    return {path: np.stack([_random(seed)[path] for seed in seeds]) for path in _SHAPES}


@functools.partial(jax.jit, static_argnums=0)
def _run(config, params, gradients):
    """Returns the parameters after each step, stacked on a new leading axis."""
    optimizer = create_optimizer(config)

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - _LEARNING_RATE * u, params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]


@functools.lru_cache
def _run_on_one_device(name):
    return _flat(_run(_CONFIGS[name], _nested(_random(0)), _nested(_gradients())))


# The papers' equations in float64: `g` are all gradients of a parameter so far, `(steps, ...)`, and
# `p` is the parameter. The parameters of each block are separate.


def _mean(g, decay):
    """Returns the moving average that starts at 0."""
    return (1 - decay) * np.tensordot(decay ** np.arange(len(g))[::-1], g, 1)


def _unbiased_mean(g, decay):
    return np.average(g, axis=0, weights=decay ** np.arange(len(g))[::-1])


def _adamw(g, p, path, config):
    root = np.sqrt(_unbiased_mean(g**2, config.beta2))
    return _unbiased_mean(g, config.beta1) / (root + config.eps)


def _lion(g, p, path, config):
    mean = _mean(g[:-1], config.beta2)
    return np.sign(config.beta1 * mean + (1 - config.beta1) * g[-1])


def _sgd(g, p, path, config):
    momentum = np.tensordot(config.momentum ** np.arange(len(g))[::-1], g, 1)
    return g[-1] + config.momentum * momentum if config.nesterov else momentum


def _ademamix(g, p, path, config):
    slow, alpha, beta3 = np.zeros_like(p), config.alpha, config.beta3
    for step, gradient in enumerate(g, start=1):
        if config.ademamix_warmup_steps:
            mu = min(step / config.ademamix_warmup_steps, 1)
            alpha = mu * config.alpha
            logs = np.log(config.beta1), np.log(config.beta3)
            beta3 = np.exp(logs[0] * logs[1] / ((1 - mu) * logs[1] + mu * logs[0]))
        slow = beta3 * slow + (1 - beta3) * gradient
    root = np.sqrt(_unbiased_mean(g**2, config.beta2))
    return (_unbiased_mean(g, config.beta1) + alpha * slow) / (root + config.eps)


def _adafactor(g, p, path, config):
    factored = p.ndim == 2 and min(p.shape) >= 128
    rows = columns = squares = 0.0
    for step, gradient in enumerate(g, start=1):
        decay, squared = 1 - step**-0.8, gradient**2 + 1e-30
        rows = decay * rows + (1 - decay) * squared.sum(-1)
        columns = decay * columns + (1 - decay) * squared.sum(0)
        squares = decay * squares + (1 - decay) * squared
    u = g[-1] / np.sqrt(np.outer(rows, columns) / rows.sum() if factored else squares)
    u /= max(1.0, np.sqrt(np.mean(u**2)))
    return u * max(1e-3, np.sqrt(np.mean(p**2)))


def _muon(g, p, path, config):
    excluded = any(pattern in path for pattern in config.muon_exclude)
    if p.ndim < 2 or excluded:
        return _adamw(g, p, path, config)
    # With bias-corrected means instead of sums, as in Nadam.
    beta, steps = config.momentum, len(g)
    x = _mean(g, beta) / (1 - beta**steps)
    if config.nesterov:
        ahead = _mean(g, beta) / (1 - beta ** (steps + 1))
        x = beta * ahead + (1 - beta) * g[-1] / (1 - beta**steps)
    x /= np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


_EQUATIONS = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
    "ademamix": _ademamix,
}
_NOT_DECAYED = {path for path in _SHAPES if any(x in path for x in ("bias", "norm", "embeddings"))}


@pytest.mark.parametrize("name", _CONFIGS)
def test_optimizers_are_the_equations_of_the_papers(name):
    config, found = _CONFIGS[name], _run_on_one_device(name)
    equation = _EQUATIONS[config.name]
    for path, g in _gradients().items():
        blocks, g = _random(0)[path].astype(np.float64), g.astype(np.float64)
        if not path.startswith("blocks"):
            blocks, g = blocks[None], g[:, None]
        decay = 0.0 if path in _NOT_DECAYED else config.weight_decay
        for step in range(_NUM_STEPS):
            directions = [
                equation(g[: step + 1, index], block, path, config)
                for index, block in enumerate(blocks)
            ]
            blocks = blocks - _LEARNING_RATE * (np.stack(directions) + decay * blocks)
            np.testing.assert_allclose(
                found[path][step].reshape(blocks.shape), blocks, atol=3e-6, err_msg=f"{path} {step}"
            )


@pytest.mark.parametrize("name", _NAMES)
def test_a_mesh_changes_nothing(name):
    mesh = create_mesh(MeshConfig(dp=1, fsdp=2, pp=2, tp=2))

    def placed(leaves, leading=()):
        specs = {path: P(*leading, *spec) for path, (_, spec) in _SHAPES.items()}
        shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
        return _nested(jax.device_put(leaves, shardings))

    found = _flat(_run(_CONFIGS[name], placed(_random(0)), placed(_gradients(), (None,))))
    for path, expected in _run_on_one_device(name).items():
        np.testing.assert_allclose(found[path], expected, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_block_in_a_stack_is_as_if_it_were_alone(name):
    path = "blocks.ffn.proj_up.kernel"
    stack, grads = _random(0)[path], _random(1)[path]
    config = OptimizerConfig(name=name, muon_exclude=(), weight_decay_exclude=())
    for index, expected in enumerate(_run_on_one_device(name)[path][0]):
        found = _run(config, {"kernel": stack[index]}, {"kernel": grads[None, index]})
        np.testing.assert_allclose(found["kernel"][0], expected, atol=1e-6)


def test_muon_moves_as_far_as_adamw():
    path = "blocks.ffn.proj_up.kernel"
    p = (1 - _LEARNING_RATE * 0.1) * _random(0)[path]
    direction = (p - _run_on_one_device("muon")[path][0]) / _LEARNING_RATE
    assert 0.15 < np.sqrt(np.mean(direction**2)) < 0.25


@pytest.mark.parametrize("name", _NAMES)
def test_every_optimizer_learns_with_the_same_learning_rate(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8))
    teacher, kernel = (rng.normal(size=(1, 8, 4)) / 8**0.5 for _ in range(2))
    params = {"blocks": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    config = OptimizerConfig(
        name=name, momentum=0.8, muon_exclude=(), weight_decay_exclude=(), weight_decay=0.01
    )
    optimizer = create_optimizer(config)

    def loss_fn(params):
        return jnp.mean((x @ params["blocks"]["kernel"] - x @ teacher) ** 2)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(lambda p, u: p - 0.02 * u, params, updates), state), loss

    losses = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=200)[1])
    losses = losses(params)
    assert losses[-1] < 0.2 * losses[0]


def test_only_patterns_of_ones_own_are_warned_of():
    params = _nested(_random(0))  # None of them is named skip.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_optimizer(OptimizerConfig()).init(params)
    with pytest.warns(UserWarning, match="'skips' matches no parameter"):
        create_optimizer(OptimizerConfig(weight_decay_exclude=("bias", "skips"))).init(params)


def test_decay_leaves_biases_norms_and_embeddings_alone():
    params = _nested(_random(0))
    optimizer = create_optimizer(OptimizerConfig(weight_decay=0.5))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for path, update in _flat(updates).items():
        expected = 0 if path in _NOT_DECAYED else 0.5 * _random(0)[path]
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"name": "adam"},
            "'adam' is unknown: choose one of adamw, lion, adafactor, muon, sgd, ademam",
        ),
        ({"grad_clip_norm": 0.0}, "0.0: it must be positive"),
        ({"grad_clip_norm": -1.0}, "-1.0: it must be positive"),
        ({"beta1": 1.0}, "1.0: it must be at least 0 and below 1"),
        ({"beta2": -0.1}, "-0.1: it must be at least 0"),
        ({"beta3": 1.5}, "1.5: it must be at least 0"),
        ({"momentum": 1.0}, "1.0: it must be at least 0"),
        ({"ema_decay": 1.0}, "1.0: it must be at least 0"),
        ({"eps": -1e-8}, "-1e-08: it must be positive"),
        ({"alpha": -1.0}, "-1.0: it must not be negative"),
        ({"ademamix_warmup_steps": -1}, "-1: it must not be negative"),
        ({"weight_decay": -0.1}, "-0.1: it must not be negative"),
        ({"max_grad_norm_ratio": 0.5}, "0.5: it must be above 1, or 0"),
        ({"muon_exclude": ("[",)}, r"'\[' is not a regular expression"),
        ({"weight_decay_exclude": ("(",)}, r"'\(' is not a regular expression"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=rf"optimizer\.{name}.*{message}"):
        OptimizerConfig(**options)
