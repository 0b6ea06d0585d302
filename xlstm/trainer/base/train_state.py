"""Creation of the train state, placed on the mesh."""

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
    carried_state: Callable[[], PyTree] = lambda: None,
    carried_specs: PyTree = None,
) -> tuple[TrainState, PyTree]:
    """Initializes a train state under `jit`, with every leaf sharded from the start.

    Args:
        init_params: Creates global, boxed parameters from a random key.
        apply_fn: The model's `apply`.
        optimizer: The optimizer; it gets plain, global arrays.
        rng: Random key; one half creates the parameters, the other half becomes `state.rng`.
        mesh: The mesh.
        abstract: Whether to return shapes and shardings only, without computing anything.
        with_ema: Whether the state has a moving average of the parameters, `params_ema`.
        carried_state: Creates the first `TrainState.carried_state`.
        carried_specs: Its partition specs.

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
            carried_state=carried_state(),
        )

    shapes = jax.eval_shape(init, rng)
    specs = nn.get_partition_spec(shapes)
    specs = specs.replace(
        opt_state=_specs_like_params(shapes.opt_state, unboxed(shapes.params), specs.params),
        carried_state=carried_specs,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if abstract:
        return abstract_arrays(shapes, specs, mesh), specs
    return jax.jit(init, out_shardings=shardings)(rng), specs


def abstract_arrays(shapes: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Returns abstract arrays with their shardings on a mesh.

    Args:
        shapes: A tree of `jax.ShapeDtypeStruct`, with or without boxes.
        specs: The tree of their partition specs.
        mesh: The mesh.

    Returns:
        The tree of `shapes`, with shardings.
    """
    leaves, structure = jax.tree.flatten(shapes)
    sharded = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(structure, sharded)


def _specs_like_params(opt_state: PyTree, params: PyTree, params_specs: PyTree) -> PyTree:
    """Returns partition specs of an optimizer's state: moments are sharded like their parameters.

    A leaf belongs to a parameter if it has the same shape and its path ends with the parameter's
    path. All other leaves are replicated.
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
