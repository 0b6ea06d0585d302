"""Creates the train state, placed on the mesh."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PRNGKeyArray, PyTree, TrainState


def create_train_state(
    init_params: Callable[[PRNGKeyArray], PyTree],
    apply_fn: Callable,
    optimizer: optax.GradientTransformation,
    rng: PRNGKeyArray,
    mesh: Mesh,
    abstract: bool = False,
) -> tuple[TrainState, PyTree]:
    """Initialises a train state under `jit`, each leaf in its place on the mesh from the start.

    Args:
        init_params: Makes global, boxed parameters from a key.
        apply_fn: The model's `apply`.
        optimizer: The optimizer.
        rng: Random key; half of it makes the parameters, half of it becomes the state's.
        mesh: The mesh.
        abstract: Whether shapes and places are enough: nothing is computed, nothing needs memory.

    Returns:
        The state, whose values do not depend on the mesh, and the tree of its partition specs.
    """

    def init(rng):
        params_rng, state_rng = jax.random.split(rng)
        state = TrainState.create(
            apply_fn=apply_fn, params=init_params(params_rng), tx=optimizer, rng=state_rng
        )
        return state.replace(step=jnp.zeros((), jnp.int32))

    shapes = jax.eval_shape(init, rng)
    specs = nn.get_partition_spec(shapes)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if abstract:
        leaves, structure = jax.tree.flatten(shapes)
        placed = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ]
        return jax.tree.unflatten(structure, placed), specs
    return jax.jit(init, out_shardings=shardings)(rng), specs
