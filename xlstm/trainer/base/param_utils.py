"""Utilities for parameter trees: paths, counts, norms, masks and non-finite values.

A leaf is a box (`nn.Partitioned`) that names mesh axes, or a plain array, which is replicated.
"""

import difflib
import heapq
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from xlstm.common_types import Parameter, PyTree, TrainState
from xlstm.distributed.data_parallel import axes_of, is_partitioned
from xlstm.distributed.mesh import bound_axes
from xlstm.visible_text import visible

_MAX_NAMED = 5  # Parameters that a message names.


def unboxed(tree: PyTree) -> PyTree:
    """Returns the tree with every box replaced by its value."""
    return jax.tree.map(lambda x: x.value if is_partitioned(x) else x, tree, is_leaf=is_partitioned)


def reboxed(tree: PyTree, like: PyTree) -> PyTree:
    """Inverts `unboxed`: returns the leaves of `tree` in the boxes of `like`."""
    return jax.tree.map(
        lambda box, x: box.replace(value=x) if is_partitioned(box) else x,
        like,
        tree,
        is_leaf=is_partitioned,
    )


def path_name(path: tuple) -> str:
    """Returns the name of a leaf: the keys of its JAX key path, joined by `.`."""
    names = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
    return ".".join(str(name) for name in names)


def _named_leaves(tree: PyTree) -> Iterator[tuple[str, Parameter]]:
    """Yields the name and the value of every leaf; the value may be a box."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_partitioned):
        yield path_name(path), leaf


def get_num_params(params: PyTree) -> int:
    """Returns the number of parameters, which may be abstract."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(unboxed(params)))


def tabulate_params(
    state: TrainState | PyTree,
    show_weight_decay: bool = False,
    weight_decay_exclude: Sequence[str] | None = None,
    weight_decay_include: Sequence[str] | None = None,
) -> str:
    """Formats a table of the parameters: name, shape, count, type and mesh axes.

    Args:
        state: A train state or a tree of parameters; may be abstract.
        show_weight_decay: Whether to add a column that shows which parameters are decayed.
        weight_decay_exclude: Patterns of parameters to exclude, see `get_param_mask_fn`.
        weight_decay_include: Patterns of parameters to include.

    Returns:
        The table as text.
    """
    params = state.params if isinstance(state, TrainState) else state
    # Narrow enough for 80 columns.
    table = Table(box=None, pad_edge=False)
    for column in ("name", "shape", "count", "dtype", "sharding"):
        table.add_column(column, justify="right" if column == "count" else "left", no_wrap=True)
    if show_weight_decay:
        table.add_column("decay")
    is_decayed = _name_matcher(weight_decay_exclude, weight_decay_include)
    for name, leaf in _named_leaves(params):
        names = leaf.names if is_partitioned(leaf) else ()
        array = leaf.value if is_partitioned(leaf) else leaf
        axes = ",".join(
            "-" if axis is None else axis if isinstance(axis, str) else "*".join(axis)
            for axis in names
        )
        shape = "x".join(map(str, array.shape)) or "scalar"
        row = [name, shape, f"{math.prod(array.shape):,}", str(array.dtype), axes or "replicated"]
        table.add_row(*row, *(["yes" if is_decayed(name) else "no"] if show_weight_decay else []))
    table.add_row("total", "", f"{get_num_params(params):,}")
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)  # Truncates no name.
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def get_sharded_norm_logits(x: Parameter) -> jax.Array:
    """Returns the squared norm of a leaf, summed over the mesh axes that it is sharded over.

    Args:
        x: A box, or an array, which counts as replicated.

    Returns:
        A float32 scalar.
    """
    value = x.value if is_partitioned(x) else x
    squared = jnp.sum(jnp.square(jnp.abs(value.astype(jnp.float32))))
    axes = bound_axes(axes_of(x.names)) if is_partitioned(x) else ()
    return lax.psum(squared, axes) if axes else squared


def get_sharded_global_norm(x: PyTree) -> tuple[jax.Array, PyTree]:
    """Returns the Euclidean norms of a tree and of its leaves.

    Args:
        x: Tree of boxes and arrays.

    Returns:
        The global norm, and the tree of the leaves' norms (a box is one leaf); float32 scalars.
    """
    squared = jax.tree.map(get_sharded_norm_logits, x, is_leaf=is_partitioned)
    total = sum(jax.tree.leaves(squared), start=jnp.zeros((), jnp.float32))
    return jnp.sqrt(total), jax.tree.map(jnp.sqrt, squared)


def _get_norms(kind: str, tree: PyTree, return_per_param: bool) -> dict[str, jax.Array]:
    total, per_leaf = get_sharded_global_norm(tree)
    norms = {kind: total}
    if return_per_param:
        norms |= {f"{kind}_{name}": norm for name, norm in _named_leaves(per_leaf)}
    return norms


def get_grad_norms(grads: PyTree, return_per_param: bool = False) -> dict[str, jax.Array]:
    """Returns `grad_norm` and, with `return_per_param`, `grad_norm_<path>` for every leaf."""
    return _get_norms("grad_norm", grads, return_per_param)


def get_param_norms(params: PyTree, return_per_param: bool = False) -> dict[str, jax.Array]:
    """Returns `param_norm` and, with `return_per_param`, `param_norm_<path>` for every leaf."""
    return _get_norms("param_norm", params, return_per_param)


def _name_matcher(
    exclude: Sequence[str] | None, include: Sequence[str] | None
) -> Callable[[str], bool]:
    def matches(name: str) -> bool:
        included = include is None or any(re.search(pattern, name) for pattern in include)
        return included and not any(re.search(pattern, name) for pattern in exclude or ())

    return matches


def get_param_mask_fn(
    exclude: Sequence[str] | None,
    include: Sequence[str] | None = None,
    *,
    may_be_missing: Collection[str] = (),
) -> Callable[[PyTree], PyTree]:
    """Creates a mask function that selects parameters by name, for example for `optax.masked`.

    Args:
        exclude: Regular expressions, searched for in the name (see `path_name`); a parameter that
            matches one of them is not selected. None excludes nothing.
        include: Regular expressions; only parameters that match one of them are selected. None
            includes everything.
        may_be_missing: Patterns that may match nothing.

    Returns:
        A function from a tree of parameters to a tree of bools of the same structure. It warns
        about every other pattern that matches nothing, which is usually a typo.
    """
    matches = _name_matcher(exclude, include)

    def mask_fn(params: PyTree) -> PyTree:
        def mask(path, leaf):
            selected = matches(path_name(path))
            return leaf.replace(value=selected) if is_partitioned(leaf) else selected

        names = [name for name, _ in _named_leaves(params)]
        patterns = (*(exclude or ()), *(include or ()))
        for pattern in (pattern for pattern in patterns if pattern not in may_be_missing):
            if names and not any(re.search(pattern, name) for name in names):
                # Python shows a warning once if its text and its line, which is this one, repeat.
                warnings.warn(_no_match_warning(pattern, names), stacklevel=1)
        return jax.tree_util.tree_map_with_path(mask, params, is_leaf=is_partitioned)

    return mask_fn


def _no_match_warning(pattern: str, names: Sequence[str]) -> str:
    def closeness(name: str) -> float:
        parts = (name, *name.split("."))
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in parts)

    nearest = heapq.nlargest(3, names, key=closeness)
    return f"the pattern {pattern!r} matches no parameter; the nearest: {', '.join(nearest)}"


def count_nonfinite(params: PyTree) -> dict[str, int]:
    """Counts the non-finite values of each parameter.

    Args:
        params: Parameters, on any mesh.

    Returns:
        The count by name, of parameters that have any; the same in all processes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(params))
    counts = _counts([leaf for _, leaf in leaves])
    named = {path_name(path): int(n) for (path, _), n in zip(leaves, counts, strict=True)}
    return {name: count for name, count in named.items() if count}


@jax.jit
def _counts(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) for x in arrays]


def nonfinite_text(counts: Mapping[str, int]) -> str:
    """Describes which parameters have non-finite values; names the first few.

    Args:
        counts: The counts by name.

    Returns:
        A clause.
    """
    first = list(counts.items())[:_MAX_NAMED]
    named = ", ".join(f"{count:,} in {visible(name)}" for name, count in first)
    num_others = len(counts) - len(first)
    more = f" and more in {num_others:,} others" if num_others else ""
    return f"numbers are infinite or NaN: {named}{more}"
