"""Parameters that are infinite or NaN: which ones, and how many."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree
from xlstm.trainer.base.param_utils import path_name, unboxed
from xlstm.visible_text import visible

_MOST_NAMED = 5


def count_nonfinite(params: PyTree) -> dict[str, int]:
    """Counts the numbers that are not finite.

    Args:
        params: Parameters, on any mesh.

    Returns:
        How many there are in each parameter that has any, by its path; the same in all processes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(params))
    counts = _counts([leaf for _, leaf in leaves])
    named = {path_name(path): int(n) for (path, _), n in zip(leaves, counts, strict=True)}
    return {name: count for name, count in named.items() if count}


@jax.jit
def _counts(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) for x in arrays]


def nonfinite_text(counts: Mapping[str, int]) -> str:
    """Says which parameters have numbers that are not finite, the first few by name.

    Args:
        counts: How many there are, by the parameter's name.

    Returns:
        The sentence.
    """
    first = list(counts.items())[:_MOST_NAMED]
    named = ", ".join(f"{count:,} in {visible(name)}" for name, count in first)
    left_out = len(counts) - len(first)
    more = f" and more in {left_out:,} others" if left_out else ""
    return f"numbers are infinite or NaN: {named}{more}"
