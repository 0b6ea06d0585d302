"""Tensor parallelism: the features and the vocabulary of a layer are sharded over a mesh axis.

Between the layers each device holds some of the tokens of every sequence, `(B, T / n, D)` on an
axis of `n` devices. A layer gathers the tokens, computes its share of the heads or hidden features,
and scatters the sum of the shares, so that each device has its local tokens again:

    column_parallel(x)   all_gather over T, then a product with sharded features
    row_parallel(x)      a product with sharded summands, then a reduce_scatter over T

Each is the transpose of the other, so gradients need no further communication. The traffic is that
of an all-reduce of whole activations, plus the gathers that rematerialization repeats in the
backward pass. In return, norms, residual connections and kept activations are sharded as well.

All functions here run inside of `shard_map`. If the axis has size 1 or is not bound, they compute
the same without communication.

References:
    Shoeybi et al., "Megatron-LM", 2019, section 3.
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
    section 4.2 (tokens sharded between the layers).
    Wang et al., "Overlap Communication with Dependent Computation via Decomposition", 2023.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import axis_index, axis_size, bound_axes

# The name of the outputs of `row_parallel`, `scatter_features` and `features_to_tokens` for
# `jax.checkpoint_policies`: a policy that saves them spares the backward pass the communication.
SCATTERED = "scattered_tokens"

_TOKENS = 1  # The axis of T in all arrays.


def _local_size(num_tokens: int, axis_names: str | Sequence[str]) -> int:
    """Returns the number of tokens of a device; raises ValueError if `T` is not divisible."""
    size, rest = divmod(num_tokens, axis_size(axis_names))
    if rest:
        raise ValueError(
            f"{num_tokens} tokens do not divide over the {axis_size(axis_names)} devices of"
            f" {axis_names}"
        )
    return size


def local_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Returns the local tokens: `(B, T, ...)` to `(B, T / n, ...)`.

    Raises:
        ValueError: If `T` is not a multiple of `n`.
    """
    size = _local_size(x.shape[_TOKENS], axis_names)
    return lax.dynamic_slice_in_dim(x, axis_index(axis_names) * size, size, _TOKENS)


def gather_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Gathers the tokens of all devices: `(B, T / n, ...)` to `(B, T, ...)`."""
    if axis_size(axis_names) == 1:
        return x
    return lax.all_gather(x, bound_axes(axis_names), axis=_TOKENS, tiled=True)


def scatter_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Sums over the devices and scatters the tokens: `(B, T, ...)` to `(B, T / n, ...)`.

    Raises:
        ValueError: If `T` is not a multiple of `n`.
    """
    _local_size(x.shape[_TOKENS], axis_names)
    if axis_size(axis_names) == 1:
        return x
    return lax.psum_scatter(x, bound_axes(axis_names), scatter_dimension=_TOKENS, tiled=True)


def column_parallel(
    fn: Callable[[jax.Array], PyTree], x: jax.Array, axis_name: str, *, overlap: bool = False
) -> PyTree:
    """Applies products with sharded features to the tokens of all devices.

    Args:
        fn: Function that computes local features token by token: `(B, t, D)` to a tree of
            `(B, t, ...)`.
        x: Local tokens `(B, T / n, D)`.
        axis_name: The mesh axis.
        overlap: Whether tokens travel in a ring, and are multiplied while the next ones are being
            sent (a collective matmul).

    Returns:
        The output of `fn` for all tokens, a tree of `(B, T, ...)`.
    """
    num_parts = axis_size(axis_name)
    if num_parts == 1 or not overlap:
        return fn(gather_tokens(x, axis_name))
    index, size = lax.axis_index(axis_name), x.shape[_TOKENS]
    to_previous = [(device, (device - 1) % num_parts) for device in range(num_parts)]

    def empty(part: jax.Array) -> jax.Array:
        shape = list(part.shape)
        shape[_TOKENS] *= num_parts
        return jnp.zeros(shape, part.dtype)

    whole = None
    for step in range(num_parts):
        following = lax.ppermute(x, axis_name, to_previous) if step + 1 < num_parts else None
        parts = fn(x)
        whole = jax.tree.map(empty, parts) if whole is None else whole
        start = (index + step) % num_parts * size
        whole = jax.tree.map(
            lambda all_, part, start=start: lax.dynamic_update_slice_in_dim(
                all_, part, start, _TOKENS
            ),
            whole,
            parts,
        )
        x = following
    return whole


def row_parallel(
    fn: Callable[[PyTree], jax.Array], x: PyTree, axis_name: str, *, overlap: bool = False
) -> jax.Array:
    """Applies a product with sharded summands, and scatters the tokens of the sum.

    Args:
        fn: Function that computes the local summand token by token: a tree of `(B, t, ...)` to
            `(B, t, D)`.
        x: Tree of the local features of all tokens, `(B, T, ...)`.
        axis_name: The mesh axis.
        overlap: Whether sums travel in a ring, and the next ones are computed while they are being
            sent (a collective matmul).

    Returns:
        Local tokens `(B, T / n, D)`.

    Raises:
        ValueError: If `T` is not a multiple of `n`.
    """
    num_parts = axis_size(axis_name)
    if num_parts == 1:
        return fn(x)
    if not overlap:
        return checkpoint_name(scatter_tokens(fn(x), axis_name), SCATTERED)
    index = lax.axis_index(axis_name)
    size = _local_size(jax.tree.leaves(x)[0].shape[_TOKENS], axis_name)
    to_next = [(device, (device + 1) % num_parts) for device in range(num_parts)]
    total = None
    for step in range(1, num_parts + 1):
        # The present sum ends at the device that is `num_parts - step` steps ahead.
        start = (index - step) % num_parts * size
        part = fn(
            jax.tree.map(
                lambda all_, start=start: lax.dynamic_slice_in_dim(all_, start, size, _TOKENS), x
            )
        )
        total = part if total is None else lax.ppermute(total, axis_name, to_next) + part
    return checkpoint_name(total, SCATTERED)


def scatter_features(x: jax.Array, axis_name: str) -> jax.Array:
    """Sums over the devices and scatters the features: `(..., F)` to `(..., F / n)`."""
    if axis_size(axis_name) == 1:
        return x
    return checkpoint_name(
        lax.psum_scatter(x, axis_name, scatter_dimension=x.ndim - 1, tiled=True), SCATTERED
    )


def tokens_to_features(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Exchanges tokens for features: local tokens `(B, T / n, D)` to features `(B, T, D / n)`."""
    if axis_size(axis_names) == 1:
        return x
    return lax.all_to_all(x, bound_axes(axis_names), x.ndim - 1, _TOKENS, tiled=True)


def features_to_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Exchanges features for tokens: local features `(B, T, D / n)` to tokens `(B, T / n, D)`.

    Raises:
        ValueError: If `T` is not a multiple of `n`.
    """
    _local_size(x.shape[_TOKENS], axis_names)
    if axis_size(axis_names) == 1:
        return x
    y = lax.all_to_all(x, bound_axes(axis_names), _TOKENS, x.ndim - 1, tiled=True)
    return checkpoint_name(y, SCATTERED)


def embed_tokens(table: jax.Array, tokens: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Looks tokens up in the local part of a table with sharded rows.

    Args:
        table: Local rows `(V / n, D)`.
        tokens: Ids `(B, T)`.
        axis_names: Mesh axes that the vocabulary is sharded over.

    Returns:
        Rows `(B, T, D)`, zero for ids of other devices, so that the sum over devices is complete.
    """
    if axis_size(axis_names) == 1:
        return jnp.take(table, tokens, axis=0)
    ids, is_local = _local_ids(tokens, table.shape[0], axis_names)
    return jnp.where(is_local[..., None], jnp.take(table, ids, axis=0), 0)


def _local_ids(
    tokens: jax.Array, local_size: int, axis_names: str | Sequence[str]
) -> tuple[jax.Array, jax.Array]:
    """Returns ids in the local part of the vocabulary, 0 for others, and which ids are local."""
    ids = tokens - axis_index(axis_names) * local_size
    is_local = (ids >= 0) & (ids < local_size)
    return jnp.where(is_local, ids, 0), is_local


def cross_entropy(
    logits: jax.Array, targets: jax.Array, axis_names: str | Sequence[str]
) -> jax.Array:
    """Returns the negative log-likelihood of targets with a sharded vocabulary.

    No device gathers the logits of the whole vocabulary. Devices exchange three numbers per token:
    the maximum, the sum of exponentials, and the logit of the target.

    Args:
        logits: Logits of the local part of the vocabulary for all tokens, `(B, T, V / n)`.
        targets: Ids `(B, T)`.
        axis_names: Mesh axes that the vocabulary is sharded over.

    Returns:
        The negative log-likelihood of the local tokens, in nats, float32 `(B, T / n)`.
    """
    logits = logits.astype(jnp.float32)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    if axis_size(axis_names) > 1:
        largest = lax.pmax(largest, bound_axes(axis_names))
    shifted = logits - largest[..., None]
    ids, is_local = _local_ids(targets, logits.shape[-1], axis_names)
    of_target = jnp.take_along_axis(shifted, ids[..., None], axis=-1)[..., 0]
    of_target = jnp.where(is_local, of_target, 0)
    sums = jnp.stack([jnp.sum(jnp.exp(shifted), axis=-1), of_target], axis=-1)
    sums = scatter_tokens(sums, axis_names)
    return jnp.log(sums[..., 0]) - sums[..., 1]


def is_correct(logits: jax.Array, targets: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Returns whether the logit of the target is the largest, with a sharded vocabulary.

    Args:
        logits: Logits of the local part of the vocabulary for all tokens, `(B, T, V / n)`.
        targets: Ids `(B, T)`.
        axis_names: Mesh axes that the vocabulary is sharded over.

    Returns:
        Bool `(B, T / n)` for the local tokens, False where another id has the same logit.
    """
    ids, is_local = _local_ids(targets, logits.shape[-1], axis_names)
    is_target = is_local[..., None] & (ids[..., None] == jnp.arange(logits.shape[-1]))
    of_target = jnp.max(jnp.where(is_target, logits, -jnp.inf), axis=-1)
    of_others = jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1)
    if axis_size(axis_names) > 1:
        of_target, of_others = lax.pmax((of_target, of_others), bound_axes(axis_names))
    return local_tokens(of_target > of_others, axis_names)
