"""Tests of the layer against its definition, computed token by token in float64."""

import jax
import numpy as np

from xlstm.models.xlstm_parallel.blocks.mlstm.layer import mLSTMPreUpLayer
from xlstm.models.xlstm_parallel.testing import lively_params, small_config

B, T, D, E, NH, DH, S = 2, 9, 16, 32, 2, 16, 4
CONFIG = small_config(block="xlstm_2024", gate_soft_cap=0.0)


def silu(x):
    return x / (1 + np.exp(-x))


def blocks_product(x, kernel):
    return np.concatenate([x[S * g : S * g + S] @ kernel[g] for g in range(E // S)])


def one_example(params, x, reset):
    """Returns the output `(T, D)` of an example; the cell is not stabilized, as in eq. 19."""
    u, z = (x @ params[name]["kernel"] for name in ("proj_up", "proj_up_gate"))
    state = C, n = np.zeros((NH, DH, DH)), np.zeros((NH, DH))
    first, outputs = 0, []
    for t in range(T):
        if reset[t]:
            first, (C, n) = t, state
        c = params["conv"]["bias"].copy()
        for back in range(min(4, t - first + 1)):
            c += params["conv"]["kernel"][3 - back, 0] * u[t - back]
        c = silu(c)
        q, k, v = (
            blocks_product(y, params[name]["kernel"])
            for name, y in (("q", c), ("k", c), ("v", u[t]))
        )
        i, f = (
            sum(y @ part for y, part in zip((q, k, v), params[name]["kernel"], strict=True))
            + params[name]["bias"]
            for name in ("igate_preact", "fgate_preact")
        )
        i, f = np.exp(i), 1 / (1 + np.exp(-f))
        q, k, v = (y.reshape(NH, DH) for y in (q / np.sqrt(DH), k, v))
        C = f[:, None, None] * C + i[:, None, None] * k[:, :, None] * v[:, None, :]
        n = f[:, None] * n + i[:, None] * k
        h = np.einsum("hkv,hk->hv", C, q) / np.maximum(np.abs((n * q).sum(1)), 1)[:, None]
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        h = h.reshape(E) * params["multihead_norm"]["scale"] + params["skip"] * c
        outputs.append((h * silu(z[t])) @ params["proj_down"]["kernel"])
    return np.stack(outputs)


def test_is_the_definition():
    params = lively_params(CONFIG, jax.random.key(1))["blocks"]["mlstm_layer"]
    params = jax.tree.map(lambda x: x[0], params)
    rng = np.random.default_rng(0)
    x, reset = rng.standard_normal((B, T, D), np.float32), rng.random((B, T)) < 0.3
    layer = mLSTMPreUpLayer(CONFIG)
    apply = jax.jit(layer.apply)
    y, state = apply({"params": params}, x, reset, None, None)
    assert state is None and reset[:, 1:].any()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected = np.stack([one_example(params, *row) for row in zip(x, reset, strict=True)])
    np.testing.assert_allclose(y, expected, atol=1e-4 * np.abs(expected).max())
