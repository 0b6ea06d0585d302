"""All blocks of a model, or of a pipeline's stage: a scan, with one in it for each run of a kind.

Blocks of one kind are one scan, and their parameters have a leading axis of the blocks. Where kinds
alternate, the scan is over the repetitions of their pattern, and goes through its runs, each a scan
too. So what has to be compiled depends on the pattern and not on the depth. Every run has
parameters of its own, with one leading axis of the run's blocks in all repetitions.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree
from xlstm.distributed.data_parallel import is_partitioned
from xlstm.distributed.mesh import axis_index, axis_size
from xlstm.distributed.tensor_parallel import SCATTERED
from xlstm.models.xlstm_parallel.blocks.block import KINDS, BlockPlace, Stream
from xlstm.models.xlstm_parallel.blocks.slstm.cell import KEPT
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.pattern import BlockPattern, Run

# Wraps the class of a block.
Wrapper = Callable[[type[nn.Module]], type[nn.Module]]


def block_stack(config: LanguageModelConfig, wrap: Wrapper) -> type[nn.Module]:
    """Makes the class of a module of all blocks of this device.

    Args:
        config: Configuration of the model.
        wrap: Applied to the class of every block.

    Returns:
        A class whose modules, made of `config`, are called with a `Stream` and `stack_places`, and
        return the stream behind the last block, and None.
    """
    model = config.model
    pattern = model.pattern
    repeats = pattern.repeats // axis_size("pp")

    def scan(target: type[nn.Module], length: int, axis: str | None, unroll: int = 1):
        return nn.scan(
            target,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=length,
            unroll=min(unroll, length),
            metadata_params={nn.PARTITION_NAME: axis},
        )

    def of_kind(kind: str) -> type[nn.Module]:
        return _rematerialized(wrap(KINDS[kind].block), model.remat)

    if pattern.is_uniform:
        return scan(of_kind(pattern.runs[0].kind), repeats, "pp", model.scan_unroll)

    class Repetition(nn.Module):
        """The blocks of a pattern, once."""

        config: LanguageModelConfig

        @nn.compact
        def __call__(self, stream: Stream, repeat: jax.Array) -> tuple[Stream, None]:
            states = stream.states
            for name, run in named_runs(pattern).items():
                blocks = scan(of_kind(run.kind), run.length, None, model.scan_unroll)
                if states is not None:
                    stream = stream._replace(states=states[run.kind])
                places = places_of(pattern, run, repeat)
                stream, _ = blocks(self.config, name=name)(stream, places)
                if states is not None:
                    states = states | {run.kind: stream.states}
            return stream._replace(states=states), None

    lengths = {name: run.length for name, run in named_runs(pattern).items()}
    return nn.map_variables(
        scan(Repetition, repeats, "pp"),
        ("params", "intermediates"),
        lambda variables: {
            collection: {name: _split(tree, lengths[name]) for name, tree in runs.items()}
            for collection, runs in variables.items()
        },
        lambda variables: jax.tree.map(_join, variables, is_leaf=is_partitioned),
        mutable=True,
    )


def stack_places(pattern: BlockPattern) -> PyTree:
    """What `block_stack` scans over, on this device.

    Args:
        pattern: The model's pattern.

    Returns:
        Places of the blocks if they are of one kind, else the numbers of the repetitions.
    """
    numbers = own_repeats(pattern)
    return BlockPlace(numbers, numbers) if pattern.is_uniform else numbers


def own_repeats(pattern: BlockPattern) -> jax.Array:
    """The numbers of the pattern's repetitions that are this stage's, int32 `(repeats / pp,)`."""
    count = pattern.repeats // axis_size("pp")
    return axis_index("pp") * count + jnp.arange(count)


def named_runs(pattern: BlockPattern) -> dict[str, Run]:
    """The runs of a pattern by the names of their parameters."""
    return {f"{place}_{run.kind}": run for place, run in enumerate(pattern.runs)}


def places_of(pattern: BlockPattern, run: Run, repeats: jax.Array) -> BlockPlace:
    """Places of a run's blocks in some repetitions of the pattern.

    Args:
        pattern: The model's pattern.
        run: One of its runs.
        repeats: Numbers of the repetitions, `(...)`.

    Returns:
        Arrays `(..., run.length)`.
    """
    repeats, blocks = repeats[..., None], jnp.arange(run.length)
    return BlockPlace(
        repeats * pattern.length() + run.first + blocks,
        repeats * pattern.length(run.kind) + run.first_of_kind + blocks,
    )


def _split(tree: PyTree, length: int) -> PyTree:
    """Cuts the leading axis of arrays and boxes in two: repetitions, and blocks of a run."""

    def split(leaf: PyTree) -> PyTree:
        if not is_partitioned(leaf):
            return leaf.reshape(-1, length, *leaf.shape[1:])
        names = (leaf.names[0], None, *leaf.names[1:])
        return leaf.replace(value=split(leaf.value), names=names)

    return jax.tree.map(split, tree, is_leaf=is_partitioned)


def _join(leaf: PyTree) -> PyTree:
    """Makes one axis of the two."""
    if not is_partitioned(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])
    return leaf.replace(value=_join(leaf.value), names=(leaf.names[0], *leaf.names[2:]))


def _rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The block, keeping less for its backward pass: what is cheap is computed again."""
    if remat == "none":
        return block
    policies = {
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(SCATTERED, KEPT),
        ),
        "block": jax.checkpoint_policies.nothing_saveable,
    }
    # The scan around it already keeps XLA from merging the two computations.
    return nn.remat(block, policy=policies[remat], prevent_cse=False)
