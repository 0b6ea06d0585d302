"""The xLSTM language model."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.distributed.data_parallel import Target, gather_on_use
from xlstm.distributed.mesh import TOKEN_AXES, VOCAB_AXES, axis_index, axis_size
from xlstm.distributed.pipeline_parallel import execute_pipeline, map_mutable_variables
from xlstm.distributed.tensor_parallel import (
    cross_entropy,
    gather_tokens,
    is_correct,
    local_tokens,
)
from xlstm.models.shared.dropout import dropout, token_keys
from xlstm.models.shared.linear import Dense, Embedding, small_init, soft_cap
from xlstm.models.shared.norm import LayerNorm, RMSNorm
from xlstm.models.xlstm_parallel.blocks.block import CARRIED_STATE, KINDS, BlockCarry
from xlstm.models.xlstm_parallel.blocks.stack import block_stack, stack_indices
from xlstm.models.xlstm_parallel.config import LanguageModelConfig

# The norm before the head, by the kind of mLSTM block.
_OUT_NORMS = {"xlstm_7b": RMSNorm, "xlstm_2024": LayerNorm}


class xLSTMLMModel(nn.Module):
    """Language model: embedding, residual blocks (see `block_stack`), norm and untied head.

    The parameters of the blocks have a leading axis of blocks, which is sharded over `pp`: inside
    of `shard_map` each device runs its own blocks.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    def setup(self):
        """Creates the layers; each parameter belongs to exactly one of them."""
        config = self.config.model
        dtype, gathered = config.compute_dtype, self._gathering_parameters
        in_init = small_init(config.embedding_dim)
        # A pipeline runs its blocks many times and gathers them once, in `_run_stages`.
        wrap = gathered if axis_size("pp") == 1 else lambda block: block
        self.embeddings = gathered(Embedding)(
            config.vocab_size, config.embedding_dim, in_init, dtype
        )
        self.blocks = block_stack(self.config, wrap)(self.config)
        self.stage = _Stage(self.blocks)
        self.out_norm = gathered(_OUT_NORMS[config.block])(config.norm_eps, dtype)
        self.lm_head = gathered(Dense)(
            config.vocab_size,
            in_init,
            (None, VOCAB_AXES),
            dtype=dtype,
            precision=config.precision,
        )

    def __call__(
        self,
        tokens: jax.Array,
        reset: jax.Array | None = None,
        state: PyTree | None = None,
    ) -> jax.Array | tuple[jax.Array, PyTree]:
        """Returns the logits of the next token after each token.

        Args:
            tokens: Ids `(B, T)`.
            reset: Bool `(B, T)`, True where a document starts: the state is dropped before that
                token. None for no resets.
            state: State before the first token (`initial_state`, or a returned state), leading axes
                `(num_blocks, B)`; None for the zero state.

        Returns:
            Logits, float32 `(B, T, V)`, of the local part of the vocabulary; with `state`, a pair
            of them and the state after the last token.

        Raises:
            ValueError: If a state is given inside of a `shard_map` with pipeline stages.
        """
        x = self.embeddings(tokens)
        if state is None:
            return self._logits(self._run_stages(BlockCarry(x, reset)))
        carry = self._carry_state(BlockCarry(x, reset, states=state))
        return self._logits(carry.x), carry.states

    def next_token_logits(
        self, tokens: jax.Array, state: PyTree, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        """Reads tokens, and returns the logits of the next token after them.

        Args:
            tokens: Ids `(B, T)`.
            state: State before the first token, see `__call__`.
            lengths: Number of valid tokens in each row, int `(B,)`; the others are padding. None
                if all tokens are valid.

        Returns:
            Logits, float32 `(B, V)`, and the state after the valid tokens. In a row without valid
            tokens the state does not change, and the logits are meaningless.
        """
        x, padding = self.embeddings(tokens), None
        if lengths is not None:
            padding = jnp.arange(tokens.shape[1]) >= lengths[:, None]
        carry = self._carry_state(BlockCarry(x, padding=padding, states=state))
        if lengths is None:
            last = carry.x[:, -1:]
        else:
            positions = jnp.maximum(lengths, 1) - 1
            last = jnp.take_along_axis(carry.x, positions[:, None, None], axis=1)
        return self._logits(last)[:, 0], carry.states

    def next_token_nll(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        targets_mask: jax.Array,
        reset: jax.Array | None = None,
        dropout_keys: PRNGKeyArray | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the summed negative log-likelihood of the targets and their number.

        Each token counts on exactly one device, so a `psum` over the mesh gives the sums of the
        global batch.

        Args:
            tokens: Ids `(B, T)`.
            targets: Ids `(B, T)`.
            targets_mask: Which targets count, bool `(B, T)`.
            reset: See `__call__`.
            dropout_keys: A random key for each example, `(B, ...)`; None for no dropout.

        Returns:
            The sum over the local unmasked targets, in nats, and their number; float32 scalars.
        """
        x, config = self.embeddings(tokens), self.config.model
        keys = None
        if config.dropout and dropout_keys is not None:
            keys = token_keys(dropout_keys, x.shape[1], axis_index(TOKEN_AXES) * x.shape[1])
            x = dropout(x, config.dropout, keys, 0)
        logits = self._logits(self._run_stages(BlockCarry(x, reset, keys)))
        nll = cross_entropy(logits, targets, VOCAB_AXES)
        mask = local_tokens(targets_mask, VOCAB_AXES)
        return jnp.sum(jnp.where(mask, nll, 0)), jnp.sum(mask, dtype=jnp.float32)

    def eval_sums(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        targets_mask: jax.Array,
        reset: jax.Array | None = None,
        groups: jax.Array | None = None,
        num_groups: int = 1,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the sums of an evaluation; `next_token_nll` describes the other arguments.

        Args:
            tokens: Ids `(B, T)`.
            targets: Ids `(B, T)`.
            targets_mask: Which targets count, bool `(B, T)`.
            reset: See `__call__`.
            groups: Group of each target, int32 `(B, T)`; None for one group.
            num_groups: `G`.

        Returns:
            Three arrays, float32 `(G,)`, over the local unmasked targets of each group: the sum of
            their negative log-likelihoods, in nats; the number that have the largest logit of all
            tokens; and their number.
        """
        logits = self._logits(self._run_stages(BlockCarry(self.embeddings(tokens), reset)))
        nll = cross_entropy(logits, targets, VOCAB_AXES)
        correct = is_correct(logits, targets, VOCAB_AXES)
        mask = local_tokens(targets_mask, VOCAB_AXES)
        values = jnp.where(mask, nll, 0), correct & mask, mask
        if groups is None:
            return tuple(jnp.sum(x, dtype=jnp.float32)[None] for x in values)
        is_member = local_tokens(groups, VOCAB_AXES)[..., None] == jnp.arange(num_groups)
        return tuple(
            jnp.sum(jnp.where(is_member, x[..., None], 0), axis=(0, 1), dtype=jnp.float32)
            for x in values
        )

    def _gathering_parameters(self, target: Target) -> Target:
        """Returns the target with its parameters gathered over `fsdp` when it is called."""
        mesh = self.config.mesh
        return gather_on_use(
            target, gather_dtype=mesh.gather_dtype, scatter_dtype=mesh.scatter_dtype
        )

    def _carry_state(self, carry: BlockCarry) -> BlockCarry:
        """Runs all blocks, starting from their states."""
        if axis_size("pp") > 1:
            raise ValueError("state is not supported with pipeline stages; pass state=None")
        return self.blocks(carry, stack_indices(self.config.model.pattern))[0]

    def _run_stages(self, carry: BlockCarry) -> jax.Array:
        """Runs all blocks; the output `(B, T / tp, D)` is the same on all stages."""
        num_stages = axis_size("pp")
        if num_stages == 1:
            return self.blocks(carry, stack_indices(self.config.model.pattern))[0].x
        if CARRIED_STATE in self.variables:
            carry = carry._replace(rows=jnp.arange(carry.x.shape[0]))

        def run(model: xLSTMLMModel, carry: BlockCarry) -> BlockCarry:
            return execute_pipeline(
                model.stage,
                carry,
                stack_indices(model.config.model.pattern),
                num_microbatches=model.config.mesh.count_microbatches(num_stages),
                model_axis_name="pp",
            )

        carry = self._gathering_parameters(run)(self, carry)
        # All stages share the work of the head: each has a part of the vocabulary.
        return lax.psum(carry.x, "pp")

    def _logits(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T / tp, D)` to logits `(B, T, V)` of the local part of the vocabulary."""
        x = gather_tokens(self.out_norm(x), "tp")
        return soft_cap(
            self.lm_head(x).astype(jnp.float32), self.config.model.output_logit_soft_cap
        )


class _Stage(nn.Module):
    """The local blocks as a stage of the pipeline."""

    blocks: nn.Module

    def __call__(self, carry: BlockCarry, indices: PyTree) -> BlockCarry:
        def run(stage: _Stage, carry: BlockCarry) -> BlockCarry:
            return stage.blocks(carry, indices)[0]

        return run(self, carry) if carry.rows is None else _on_rows(run, carry)(self, carry)


def _on_rows(run: Callable[..., BlockCarry], carry: BlockCarry) -> Callable[..., BlockCarry]:
    """Transforms a function of a stage to read and replace the carried states of some rows."""
    first, size = carry.rows[0], carry.rows.size

    def read(states: PyTree) -> PyTree:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 1), states)

    def write(states: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, 1), states, new
        )

    return map_mutable_variables(run, CARRIED_STATE, read, write)


def initial_state(config: LanguageModelConfig, batch_size: int) -> PyTree:
    """Returns the state before a document, for all blocks.

    Args:
        config: Configuration of the model.
        batch_size: `B`.

    Returns:
        The zero state with leading axes `(num_blocks, B)`, see `KINDS`; for a model with several
        kinds of blocks, a dictionary of the states of each kind.
    """
    model = config.model
    states = {
        kind: KINDS[kind].zero_state(model, (count, batch_size))
        for kind, count in model.pattern.counts.items()
    }
    return _unwrap_single_kind(states)


def state_specs(config: LanguageModelConfig, rows: str | tuple[str, ...] | None) -> PyTree:
    """Returns the partition specs of a state.

    Args:
        config: Configuration of the model.
        rows: The mesh axes that the rows are sharded over, or None.

    Returns:
        The partition specs of `initial_state`, see `BlockKind.state_specs`.
    """
    specs = {kind: KINDS[kind].state_specs(rows) for kind in config.model.pattern.counts}
    return _unwrap_single_kind(specs)


def _unwrap_single_kind(states: dict[str, PyTree]) -> PyTree:
    return states if len(states) > 1 else next(iter(states.values()))
