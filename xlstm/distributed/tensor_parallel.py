"""Tensor parallelism: what a layer computes for a token is divided over a mesh axis.

Between the layers each device holds some of the tokens of every sequence, `(B, T / n, D)` along an
axis of `n` devices. A layer gathers the tokens, does its share of the heads or hidden features, and
scatters the sum of the shares, so that each device has its tokens again:

    column_parallel(x)   all_gather over T, then a product whose features are divided
    row_parallel(x)      a product whose summands are divided, then a reduce_scatter over T

Each is the transpose of the other's communication, so that gradients need nothing of their own.
What is sent is what an all-reduce of whole activations would send, and once more what a layer
gathers that is computed again for the backward pass; but norms, residuals and what is kept are
divided as well.

All functions here run inside of `shard_map`; where the axis has size 1 or there is none, they do
the same and send nothing.

References:
    Shoeybi et al., "Megatron-LM", 2019, section 3.
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
    section 4.2 (tokens divided between the layers).
    Wang et al., "Overlap Communication with Dependent Computation via Decomposition", 2023.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import axis_index, axis_size, bound_axes

# What `row_parallel`, `scatter_features` and `features_to_tokens` return, under this name for
# `jax.checkpoint_policies`: whoever keeps it need not communicate again in the backward pass.
SCATTERED = "scattered_tokens"

_TOKENS = 1  # The dimension of T in all arrays.


def _part_size(num_tokens: int, axis_names: str | Sequence[str]) -> int:
    """The number of tokens of one device; raises ValueError if they do not divide."""
    size, rest = divmod(num_tokens, axis_size(axis_names))
    if rest:
        raise ValueError(
            f"{num_tokens} tokens do not divide over the {axis_size(axis_names)} devices of"
            f" {axis_names}"
        )
    return size


def own_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """This device's part of the tokens: `(B, T, ...)` to `(B, T / n, ...)`.

    Raises:
        ValueError: If `T` does not divide.
    """
    size = _part_size(x.shape[_TOKENS], axis_names)
    return lax.dynamic_slice_in_dim(x, axis_index(axis_names) * size, size, _TOKENS)


def gather_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Brings the tokens of all devices together: `(B, T / n, ...)` to `(B, T, ...)`."""
    if axis_size(axis_names) == 1:
        return x
    return lax.all_gather(x, bound_axes(axis_names), axis=_TOKENS, tiled=True)


def scatter_tokens(x: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Sums over the devices and leaves each its tokens: `(B, T, ...)` to `(B, T / n, ...)`.

    Raises:
        ValueError: If `T` does not divide.
    """
    _part_size(x.shape[_TOKENS], axis_names)
    if axis_size(axis_names) == 1:
        return x
    return lax.psum_scatter(x, bound_axes(axis_names), scatter_dimension=_TOKENS, tiled=True)


def column_parallel(
    fn: Callable[[jax.Array], PyTree], x: jax.Array, axis_name: str, *, overlap: bool = False
) -> PyTree:
    """Applies products whose features are divided to the tokens of all devices.

    Args:
        fn: Computes this device's features, each token by itself: `(B, t, D)` to a tree of
            `(B, t, ...)`.
        x: This device's tokens `(B, T / n, D)`.
        axis_name: The mesh axis.
        overlap: Whether tokens travel in a ring, and are multiplied while the next are on their way
            (a collective matmul).

    Returns:
        What `fn` returns for all tokens, leaves `(B, T, ...)`.
    """
    num_parts = axis_size(axis_name)
    if num_parts == 1 or not overlap:
        return fn(gather_tokens(x, axis_name))
    index, size = lax.axis_index(axis_name), x.shape[_TOKENS]
    to_previous = [(place, (place - 1) % num_parts) for place in range(num_parts)]

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
    """Applies a product whose summands are divided, and leaves each device the sum for its tokens.

    Args:
        fn: Computes this device's summand, each token by itself: a tree of `(B, t, ...)` to
            `(B, t, D)`.
        x: Tree of this device's features of all tokens, leaves `(B, T, ...)`.
        axis_name: The mesh axis.
        overlap: Whether sums travel in a ring, and the next are computed while they are on their
            way (a collective matmul).

    Returns:
        This device's tokens `(B, T / n, D)`.

    Raises:
        ValueError: If `T` does not divide.
    """
    num_parts = axis_size(axis_name)
    if num_parts == 1:
        return fn(x)
    if not overlap:
        return checkpoint_name(scatter_tokens(fn(x), axis_name), SCATTERED)
    index = lax.axis_index(axis_name)
    size = _part_size(jax.tree.leaves(x)[0].shape[_TOKENS], axis_name)
    to_next = [(place, (place + 1) % num_parts) for place in range(num_parts)]
    total = None
    for step in range(1, num_parts + 1):
        # The sum that is here now ends at the device `num_parts - step` places further on.
        start = (index - step) % num_parts * size
        part = fn(
            jax.tree.map(
                lambda all_, start=start: lax.dynamic_slice_in_dim(all_, start, size, _TOKENS), x
            )
        )
        total = part if total is None else lax.ppermute(total, axis_name, to_next) + part
    return checkpoint_name(total, SCATTERED)


def scatter_features(x: jax.Array, axis_name: str) -> jax.Array:
    """Sums over the devices and leaves each its features: `(..., F)` to `(..., F / n)`."""
    if axis_size(axis_name) == 1:
        return x
    return checkpoint_name(
        lax.psum_scatter(x, axis_name, scatter_dimension=x.ndim - 1, tiled=True), SCATTERED
    )


def tokens_to_features(x: jax.Array, axis_name: str) -> jax.Array:
    """Exchanges tokens for features: `(B, T / n, D)` to this device's features `(B, T, D / n)`."""
    if axis_size(axis_name) == 1:
        return x
    return lax.all_to_all(x, axis_name, x.ndim - 1, _TOKENS, tiled=True)


def features_to_tokens(x: jax.Array, axis_name: str) -> jax.Array:
    """Exchanges features for tokens: `(B, T, D / n)` to this device's tokens `(B, T / n, D)`.

    Raises:
        ValueError: If `T` does not divide.
    """
    _part_size(x.shape[_TOKENS], axis_name)
    if axis_size(axis_name) == 1:
        return x
    return checkpoint_name(lax.all_to_all(x, axis_name, _TOKENS, x.ndim - 1, tiled=True), SCATTERED)


def embed_tokens(table: jax.Array, tokens: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Looks tokens up in this device's part of a table whose rows are divided.

    Args:
        table: This device's rows `(V / n, D)`.
        tokens: Ids `(B, T)`.
        axis_names: The mesh axes over which the vocabulary is divided.

    Returns:
        The rows `(B, T, D)`, zero where another device has the row: the sum over devices is whole.
    """
    if axis_size(axis_names) == 1:
        return jnp.take(table, tokens, axis=0)
    places, is_here = _places(tokens, table.shape[0], axis_names)
    return jnp.where(is_here[..., None], jnp.take(table, places, axis=0), 0)


def _places(
    tokens: jax.Array, num_here: int, axis_names: str | Sequence[str]
) -> tuple[jax.Array, jax.Array]:
    """Where ids lie in this device's part of the vocabulary, and whether they do."""
    places = tokens - axis_index(axis_names) * num_here
    is_here = (places >= 0) & (places < num_here)
    return jnp.where(is_here, places, 0), is_here


def cross_entropy(
    logits: jax.Array, targets: jax.Array, axis_names: str | Sequence[str]
) -> jax.Array:
    """Negative log-likelihood of targets when the vocabulary is divided.

    No device sees the logits of the whole vocabulary: maxima, sums of exponentials and the targets'
    logits are all that is sent, three numbers a token.

    Args:
        logits: Logits of this device's part of the vocabulary for all tokens, `(B, T, V / n)`.
        targets: Ids `(B, T)`.
        axis_names: The mesh axes over which the vocabulary is divided.

    Returns:
        The negative log-likelihood, in nats, of this device's tokens, float32 `(B, T / n)`.
    """
    logits = logits.astype(jnp.float32)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    if axis_size(axis_names) > 1:
        largest = lax.pmax(largest, bound_axes(axis_names))
    shifted = logits - largest[..., None]
    places, is_here = _places(targets, logits.shape[-1], axis_names)
    of_target = jnp.take_along_axis(shifted, places[..., None], axis=-1)[..., 0]
    of_target = jnp.where(is_here, of_target, 0)
    sums = jnp.stack([jnp.sum(jnp.exp(shifted), axis=-1), of_target], axis=-1)
    sums = scatter_tokens(sums, axis_names)
    return jnp.log(sums[..., 0]) - sums[..., 1]


def is_correct(logits: jax.Array, targets: jax.Array, axis_names: str | Sequence[str]) -> jax.Array:
    """Whether a target's logit is larger than all others, when the vocabulary is divided.

    Args:
        logits: Logits of this device's part of the vocabulary for all tokens, `(B, T, V / n)`.
        targets: Ids `(B, T)`.
        axis_names: The mesh axes over which the vocabulary is divided.

    Returns:
        Of this device's tokens, bool `(B, T / n)`; where two share the first place, neither has it.
    """
    places, is_here = _places(targets, logits.shape[-1], axis_names)
    is_target = is_here[..., None] & (places[..., None] == jnp.arange(logits.shape[-1]))
    of_target = jnp.max(jnp.where(is_target, logits, -jnp.inf), axis=-1)
    of_others = jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1)
    if axis_size(axis_names) > 1:
        of_target, of_others = lax.pmax((of_target, of_others), bound_axes(axis_names))
    return own_tokens(of_target > of_others, axis_names)
