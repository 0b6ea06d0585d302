"""Times the sLSTM against Flax's LSTM and against its own recurrent products.

    bazel run //xlstm/tools:benchmark_slstm

All candidates are compiled first and then run in turn, so that a drift of the machine's speed
affects them equally. A pass is forward and backward, with gradients of inputs and weights. The
lower bound is a scan over nothing but the recurrent products of both passes.
"""

import json
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from rich.table import Table

from xlstm.common_types import PyTree
from xlstm.files import write_atomically
from xlstm.models.xlstm_parallel.blocks.slstm.cell import slstm
from xlstm.models.xlstm_parallel.blocks.slstm.layer import sLSTMLayer
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.tools.command_line import output_path, print_table, run
from xlstm.tools.processes import initialize_devices
from xlstm.trainer.base.throughput import measure_matmul_rate

_BATCH = flags.DEFINE_integer("batch_size", 8, "Number of sequences.", lower_bound=1)
_TIME = flags.DEFINE_integer("tokens", 512, "Tokens per sequence.", lower_bound=1)
_DIM = flags.DEFINE_integer("embedding_dim", 256, "Number of channels.", lower_bound=1)
_HEADS = flags.DEFINE_integer("num_heads", 4, "Number of heads.", lower_bound=1)
_REPEATS = flags.DEFINE_integer(
    "repeats", 20, "Number of timed runs of each candidate.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as an object.")


def _candidates(batch: int, time: int, dim: int, num_heads: int) -> dict[str, tuple]:
    """Returns functions with their weights and inputs `(B, T, D)`, by name."""
    x = jax.random.normal(jax.random.key(0), (batch, time, dim))
    # All multiply with JAX's default precision, as the LSTM does.
    sizes = {"embedding_dim": dim, "num_heads": num_heads, "num_blocks": 1}
    model = ModelConfig(**sizes, ratio="[0:1]", matmul_precision="default")
    layer = sLSTMLayer(LanguageModelConfig(model))
    lstm = nn.RNN(nn.OptimizedLSTMCell(dim))
    layer_params = nn.meta.unbox(layer.init(jax.random.key(1), x, None, None, None))
    recurrent = layer_params["params"]["recurrent"]
    gates = jax.random.normal(jax.random.key(2), (4, batch, num_heads, time, dim // num_heads))

    def products(recurrent: jax.Array, x: jax.Array) -> jax.Array:
        """Multiplies by the weights and by their transpose for every token."""

        def step(h, _):
            mixed = jnp.einsum("nbd,nde->nbe", h, recurrent)
            return jnp.einsum("nbe,nde->nbd", mixed, recurrent), None

        h = x[:, 0].reshape(batch, num_heads, -1).swapaxes(0, 1)
        return lax.scan(step, h, length=time)[0]

    def gradient(apply: Callable) -> Callable:
        return jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), (0, 1))

    return {
        "sLSTM cell": (gradient(lambda r, gates: slstm(*gates, r)[0]), recurrent, gates),
        "sLSTM layer": (
            gradient(lambda params, x: layer.apply(params, x, None, None, None)[0]),
            layer_params,
            x,
        ),
        "LSTM of Flax": (gradient(lstm.apply), lstm.init(jax.random.key(1), x), x),
        "recurrent products": (products, recurrent, x),
    }


def measure(batch: int, time_: int, dim: int, num_heads: int, repeats: int) -> PyTree:
    """Times all candidates.

    Args:
        batch: `B`.
        time_: `T`.
        dim: `D`.
        num_heads: `NH`.
        repeats: Number of timed runs of each.

    Returns:
        For each candidate its median in microseconds per token of a sequence, its ratio to the
        LSTM's time, and the share of its time that the recurrent products alone take.
    """
    compiled = {
        name: (jax.jit(fn).lower(*arguments).compile(), arguments)
        for name, (fn, *arguments) in _candidates(batch, time_, dim, num_heads).items()
    }
    times = {name: [] for name in compiled}
    for number in range(repeats + 1):
        for name, (fn, arguments) in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            if number:  # The first run warms up.
                times[name].append(time.perf_counter() - begin)
    medians = {name: float(np.median(runs)) for name, runs in times.items()}
    return {
        name: {
            "microseconds_a_token": median / time_ / batch * 1e6,
            "ratio_to_lstm": median / medians["LSTM of Flax"],
            "recurrent_products_fraction": medians["recurrent products"] / median,
        }
        for name, median in medians.items()
    }


def main(argv: list[str]) -> None:
    """Times the candidates as the flags say, and prints a table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _DIM.value % _HEADS.value:
        raise ValueError(f"--num_heads={_HEADS.value} does not divide {_DIM.value} channels")
    json_path = output_path("json", _JSON.value)
    initialize_devices()
    sizes = _BATCH.value, _TIME.value, _DIM.value, _HEADS.value
    rows = measure(*sizes, _REPEATS.value)
    rate = measure_matmul_rate(jnp.float32) / 1e9
    table = Table(title="B {}, T {}, D {}, {} heads; matmul {:.0f} GFLOP/s".format(*sizes, rate))
    for column in ("", "us/token", "ratio to LSTM", "share of products"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        values = list(row.values())
        table.add_row(name, f"{values[0]:.2f}", f"{values[1]:.2f}", f"{values[2]:.0%}")
    print_table(table)
    if json_path:
        content = {"matmul_rate_gflop_per_s": rate, "rows": rows}
        write_atomically(json_path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
