"""Creates the train state, placed on the mesh."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PRNGKeyArray, PyTree, TrainState
from xlstm.trainer.base.param_utils import unboxed


def create_train_state(
    init_params: Callable[[PRNGKeyArray], PyTree],
    apply_fn: Callable,
    optimizer: optax.GradientTransformation,
    rng: PRNGKeyArray,
    mesh: Mesh,
    abstract: bool = False,
    with_ema: bool = False,
) -> tuple[TrainState, PyTree]:
    """Initialises a train state under `jit`, each leaf in its place on the mesh from the start.

    Args:
        init_params: Makes global, boxed parameters from a key.
        apply_fn: The model's `apply`.
        optimizer: The optimizer; it sees plain global arrays.
        rng: Random key; half of it makes the parameters, half of it becomes the state's.
        mesh: The mesh.
        abstract: Whether shapes and places are enough: nothing is computed, nothing needs memory.
        with_ema: Whether the state has a moving average of the parameters.

    Returns:
        The state, whose values do not depend on the mesh, and the tree of its partition specs.
    """

    def init(rng):
        params_rng, state_rng = jax.random.split(rng)
        params = init_params(params_rng)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=optimizer,
            opt_state=optimizer.init(unboxed(params)),
            rng=state_rng,
            params_ema=params if with_ema else None,
            grad_norm_mean=jnp.zeros((), jnp.float32),
            skipped_steps=jnp.zeros((), jnp.int32),
        )

    shapes = jax.eval_shape(init, rng)
    specs = nn.get_partition_spec(shapes)
    specs = specs.replace(
        opt_state=_specs_like_params(shapes.opt_state, unboxed(shapes.params), specs.params)
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if abstract:
        return abstract_arrays(shapes, specs, mesh), specs
    return jax.jit(init, out_shardings=shardings)(rng), specs


def abstract_arrays(shapes: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Adds to the shapes of arrays where on a mesh they are.

    Args:
        shapes: A tree of `jax.ShapeDtypeStruct`, in boxes or not.
        specs: The partition spec of each.
        mesh: The mesh.

    Returns:
        The same tree, with shardings.
    """
    leaves, structure = jax.tree.flatten(shapes)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def _specs_like_params(opt_state: PyTree, params: PyTree, params_specs: PyTree) -> PyTree:
    """Partition specs of an optimizer's state: what it has of each parameter lies like that one.

    Such a leaf has the parameter's shape, and the parameter's path is the end of its own; all
    other leaves are whole on every device.
    """
    specs = {
        path: (param.shape, spec)
        for (path, param), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(params_specs), strict=True
        )
    }

    def find(path: tuple, leaf: jax.Array) -> P:
        ends = (specs.get(path[start:]) for start in range(len(path)))
        shape, spec = next((end for end in ends if end), (None, P()))
        return spec if leaf.shape == shape else P()

    return jax.tree_util.tree_map_with_path(find, opt_state)
