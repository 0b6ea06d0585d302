"""The xLSTM language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.models.shared.dense import Dense
from xlstm.models.shared.embedding import Embedding
from xlstm.models.shared.init import small_init
from xlstm.models.shared.norm import RMSNorm
from xlstm.models.shared.soft_cap import soft_cap
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import MLSTMState, zero_state
from xlstm.models.xlstm_parallel.blocks.mlstm.block import mLSTMBlock
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class xLSTMLMModel(nn.Module):
    """Embedding, a scan over residual blocks, a norm and an untied head.

    The blocks' parameters have a leading axis of the blocks, which is cut over `pp`.

    Attributes:
        config: Configuration of the model.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        reset: jax.Array | None = None,
        state: MLSTMState | None = None,
    ) -> jax.Array | tuple[jax.Array, MLSTMState]:
        """Computes the logits of the token that follows each token.

        Args:
            tokens: Ids `(B, T)`.
            reset: True where a document begins: the state is dropped before that token, bool
                `(B, T)`; None for nowhere.
            state: State before the first token (`initial_state`, or one that was returned), leading
                axes `(num_blocks, B, NH)`; None for the zero state.

        Returns:
            Logits, float32 `(B, T, V)`; if `state` was given, the pair of them and the last state.
        """
        config = self.config.model
        dtype = config.compute_dtype
        in_init = small_init(config.embedding_dim)
        x = Embedding(config.vocab_size, config.embedding_dim, in_init, dtype, name="embeddings")(
            tokens
        )
        blocks = nn.scan(
            _rematerialized(mLSTMBlock, config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=config.num_blocks,
            unroll=min(config.scan_unroll, config.num_blocks),
            metadata_params={nn.PARTITION_NAME: "pp"},
        )
        x, last_state = blocks(self.config, name="blocks")(x, reset, state)
        x = RMSNorm(config.norm_eps, dtype, name="out_norm")(x)
        head = Dense(config.vocab_size, in_init, (None, "tp"), dtype=dtype, name="lm_head")
        logits = soft_cap(head(x).astype(jnp.float32), config.output_logit_soft_cap)
        return logits if state is None else (logits, last_state)


def _rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The block, keeping less for its backward pass: what is cheap is computed again."""
    if remat == "none":
        return block
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": jax.checkpoint_policies.nothing_saveable,
    }
    # The scan around it already keeps XLA from merging the two computations.
    return nn.remat(block, policy=policies[remat], prevent_cse=False)


def initial_state(config: LanguageModelConfig, batch_size: int) -> MLSTMState:
    """The state before a document, for every block.

    Args:
        config: Configuration of the model.
        batch_size: `B`.

    Returns:
        The zero state with leading axes `(num_blocks, B, NH)`.
    """
    model = config.model
    leading = (model.num_blocks, batch_size, model.num_heads)
    return zero_state(leading, model.qk_dim // model.num_heads, model.v_dim // model.num_heads)
