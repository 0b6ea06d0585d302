"""The xLSTM language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.distributed.data_parallel import Target, gather_on_use
from xlstm.distributed.mesh import VOCAB_AXES, axis_index, axis_size
from xlstm.distributed.pipeline_parallel import execute_pipeline
from xlstm.distributed.tensor_parallel import (
    cross_entropy,
    gather_tokens,
    is_correct,
    own_tokens,
)
from xlstm.models.shared.dropout import dropout, token_keys
from xlstm.models.shared.linear import Dense, Embedding, small_init, soft_cap
from xlstm.models.shared.norm import LayerNorm, RMSNorm
from xlstm.models.xlstm_parallel.blocks.block import KINDS, Stream
from xlstm.models.xlstm_parallel.blocks.stack import block_stack, stack_places
from xlstm.models.xlstm_parallel.config import LanguageModelConfig

# The norm before the head, by the mLSTM block.
_OUT_NORMS = {"xlstm_7b": RMSNorm, "xlstm_2024": LayerNorm}


class xLSTMLMModel(nn.Module):
    """Embedding, residual blocks (see `block_stack`), a norm and an untied head.

    The blocks' parameters have a leading axis of the blocks, which is cut over `pp`: inside of
    `shard_map` each device runs its own blocks.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    def setup(self):
        """Makes the layers; a parameter is read by one of them alone."""
        config = self.config.model
        dtype, gathered = config.compute_dtype, self._gathering_parameters
        in_init = small_init(config.embedding_dim)
        # A pipeline runs its blocks many times, and gathers them once before, see `_run_stages`.
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
        """Computes the logits of the token that follows each token.

        Args:
            tokens: Ids `(B, T)`.
            reset: True where a document begins: the state is dropped before that token, bool
                `(B, T)`; None for nowhere.
            state: State before the first token (`initial_state`, or one that was returned), leading
                axes `(num_blocks, B)`; None for the zero state.

        Returns:
            Logits, float32 `(B, T, V)`, of this device's part of the vocabulary; if `state` was
            given, the pair of them and the last state.

        Raises:
            ValueError: If a state is given inside of a `shard_map` with pipeline stages.
        """
        x = self.embeddings(tokens)
        if state is None:
            return self._logits(self._run_stages(Stream(x, reset)))
        stream = self._carry_state(Stream(x, reset, states=state))
        return self._logits(stream.x), stream.states

    def next_token_logits(
        self, tokens: jax.Array, state: PyTree, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        """Reads tokens, and computes the logits of the one that follows them.

        Args:
            tokens: Ids `(B, T)`.
            state: State before the first token, see `__call__`.
            lengths: How many of the tokens count, int `(B,)`; those behind are padding. None for
                all.

        Returns:
            Logits, float32 `(B, V)`, and the state after the tokens that count. Where none counts
            the state is as before, and the logits mean nothing.
        """
        x, padding = self.embeddings(tokens), None
        if lengths is not None:
            padding = jnp.arange(tokens.shape[1]) >= lengths[:, None]
        stream = self._carry_state(Stream(x, padding=padding, states=state))
        if lengths is None:
            last = stream.x[:, -1:]
        else:
            places = jnp.maximum(lengths, 1) - 1
            last = jnp.take_along_axis(stream.x, places[:, None, None], axis=1)
        return self._logits(last)[:, 0], stream.states

    def next_token_nll(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        targets_mask: jax.Array,
        reset: jax.Array | None = None,
        dropout_keys: PRNGKeyArray | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the negative log-likelihood of targets.

        Every token counts on one device: the sums over the mesh are those of the whole batch.

        Args:
            tokens: Ids `(B, T)`.
            targets: Ids `(B, T)`.
            targets_mask: Which targets count, bool `(B, T)`.
            reset: See `__call__`.
            dropout_keys: A random key for each example, `(B, ...)`; None for no dropout.

        Returns:
            The sum over this device's targets that count, in nats, and their number; float32
            scalars.
        """
        x, config = self.embeddings(tokens), self.config.model
        keys = None
        if config.dropout and dropout_keys is not None:
            keys = token_keys(dropout_keys, x.shape[1], axis_index("tp") * x.shape[1])
            x = dropout(x, config.dropout, keys, 0)
        logits = self._logits(self._run_stages(Stream(x, reset, keys)))
        nll = cross_entropy(logits, targets, VOCAB_AXES)
        mask = own_tokens(targets_mask, VOCAB_AXES)
        return jnp.sum(jnp.where(mask, nll, 0)), jnp.sum(mask, dtype=jnp.float32)

    def eval_sums(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        targets_mask: jax.Array,
        reset: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Judges predictions of targets; arguments as for `next_token_nll`.

        Returns:
            The sum of the negative log-likelihoods over this device's targets that count, in nats;
            how many of them have the largest logit of all tokens; and their number; float32
            scalars.
        """
        logits = self._logits(self._run_stages(Stream(self.embeddings(tokens), reset)))
        nll = cross_entropy(logits, targets, VOCAB_AXES)
        is_right = is_correct(logits, targets, VOCAB_AXES)
        mask = own_tokens(targets_mask, VOCAB_AXES)
        sums = jnp.where(mask, nll, 0), is_right & mask, mask
        return tuple(jnp.sum(x, dtype=jnp.float32) for x in sums)

    def _gathering_parameters(self, target: Target) -> Target:
        """The module class or function of a module, gathering over `fsdp` what it uses."""
        mesh = self.config.mesh
        return gather_on_use(
            target, gather_dtype=mesh.gather_dtype, scatter_dtype=mesh.scatter_dtype
        )

    def _carry_state(self, stream: Stream) -> Stream:
        """Runs all blocks, each from its own state on."""
        if axis_size("pp") > 1:
            raise ValueError("a state does not go through pipeline stages; pass state=None")
        return self.blocks(stream, stack_places(self.config.model.pattern))[0]

    def _run_stages(self, stream: Stream) -> jax.Array:
        """Runs all blocks; the output `(B, T / tp, D)` is the same on all stages."""
        num_stages = axis_size("pp")
        if num_stages == 1:
            return self.blocks(stream, stack_places(self.config.model.pattern))[0].x

        def run(model: xLSTMLMModel, stream: Stream) -> Stream:
            return execute_pipeline(
                model.stage,
                stream,
                stack_places(model.config.model.pattern),
                num_microbatches=model.config.mesh.count_microbatches(num_stages),
                model_axis_name="pp",
            )

        stream = self._gathering_parameters(run)(self, stream)
        # All stages share the head's work: each has its part of the vocabulary.
        return lax.psum(stream.x, "pp")

    def _logits(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T / tp, D)` to logits `(B, T, V)` of this device's part of the vocabulary."""
        x = gather_tokens(self.out_norm(x), "tp")
        return soft_cap(
            self.lm_head(x).astype(jnp.float32), self.config.model.output_logit_soft_cap
        )


class _Stage(nn.Module):
    """Blocks as a stage of the pipeline."""

    blocks: nn.Module

    def __call__(self, stream: Stream, places: PyTree) -> Stream:
        return self.blocks(stream, places)[0]


def initial_state(config: LanguageModelConfig, batch_size: int) -> PyTree:
    """The state before a document, for every block.

    Args:
        config: Configuration of the model.
        batch_size: `B`.

    Returns:
        The zero state of the blocks, leading axes `(num_blocks, B)`; if they are of several kinds,
        a dictionary of those of each kind. See `KINDS`.
    """
    model = config.model
    states = {
        kind: KINDS[kind].zero_state(model, (count, batch_size))
        for kind, count in model.pattern.counts.items()
    }
    return _of_the_only_kind(states)


def state_specs(config: LanguageModelConfig, rows: str | tuple[str, ...] | None) -> PyTree:
    """How a state is cut over a mesh.

    Args:
        config: Configuration of the model.
        rows: The mesh axes that the rows are cut over, or None.

    Returns:
        The partition specs of `initial_state`: heads and their channels are cut over `tp`.
    """
    specs = {kind: KINDS[kind].state_specs(rows) for kind in config.model.pattern.counts}
    return _of_the_only_kind(specs)


def _of_the_only_kind(states: dict[str, PyTree]) -> PyTree:
    return states if len(states) > 1 else next(iter(states.values()))
