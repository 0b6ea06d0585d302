"""The split of a batch into equal parts."""

import jax

from xlstm.common_types import PyTree


def split_batch(batch: PyTree, num_parts: int, parts: str) -> PyTree:
    """Splits every leaf `(B, ...)` into `(num_parts, B / num_parts, ...)`.

    Args:
        batch: Tree of arrays with the examples on the leading axis.
        num_parts: Number of parts.
        parts: Name of the parts in errors, where `num_<parts>` is the name of their number.

    Returns:
        The tree of split arrays.

    Raises:
        ValueError: If the leaves disagree on the number of examples, or if it is not a multiple of
            `num_parts`.
    """
    if num_parts < 1:
        raise ValueError(f"num_{parts}={num_parts}: it must be at least 1")
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"the leaves of a batch must agree on their leading axis, the examples; found {sizes}"
        )
    (batch_size,) = sizes
    if batch_size % num_parts:
        raise ValueError(
            f"a batch of {batch_size} examples does not divide into {num_parts} {parts}"
        )
    return jax.tree.map(
        lambda x: x.reshape(num_parts, batch_size // num_parts, *x.shape[1:]), batch
    )
