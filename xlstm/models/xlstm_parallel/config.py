"""Configuration of the xLSTM language model."""

import dataclasses
import typing

import jax.numpy as jnp

from xlstm.common_types import DTYPES
from xlstm.distributed.mesh import MeshConfig
from xlstm.models.shared.feed_forward import feed_forward_dim
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import BackendConfig

_REMAT = ("none", "dots", "block")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the model; the defaults are those of xLSTM-7B but for the sizes."""

    vocab_size: int = 256  # Number of token ids, V.
    embedding_dim: int = 128  # Size of the residual stream, D.
    num_blocks: int = 4  # Number of residual blocks, each an mLSTM layer and a feed-forward layer.
    num_heads: int = 4  # Number of mLSTM heads, NH.
    qk_dim_factor: float = 0.5  # Queries and keys of all heads together have this factor times D.
    v_dim_factor: float = 1.0  # Values of all heads together have this factor times D.
    ffn_proj_factor: float = 2.667  # The feed-forward layer's hidden size is this factor times D,
    ffn_round_up_to_multiple_of: int = 64  # rounded up to a multiple of this.
    gate_soft_cap: float = 15.0  # Bound of the gate pre-activations.
    output_logit_soft_cap: float = 30.0  # Bound of the logits.
    norm_eps: float = 1e-6  # Added to the variances in the norms.
    igate_bias_init: float = -10.0  # Initial bias of the input gates.
    dropout: float = 0.0  # Share of the embedding's and of each layer's outputs that is dropped.
    dtype: str = "float32"  # Type of the computation, float32 or bfloat16; parameters are float32.
    remat: str = "dots"  # What the backward pass computes again: none; dots, all but the matmuls of
    # the dense layers; block, everything.
    scan_unroll: int = 1  # Blocks that a step of the scan over blocks holds; compiles slower.

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and value < 1:
                raise ValueError(f"model.{name}={value}: it must be at least 1")
            if kind is float and name not in ("igate_bias_init", "dropout") and not value > 0:
                raise ValueError(f"model.{name}={value}: it must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: it must be at least 0 and below 1")
        for name in ("qk_dim", "v_dim"):
            size = getattr(self, name)
            if size % self.num_heads or size < self.num_heads:
                raise ValueError(
                    f"model.num_heads={self.num_heads} does not divide {name} = {size}"
                    f" (model.{name}_factor * model.embedding_dim)"
                )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"model.dtype={self.dtype!r} is unknown; there are {', '.join(DTYPES)}"
            )
        if self.remat not in _REMAT:
            raise ValueError(
                f"model.remat={self.remat!r} is unknown; there are {', '.join(_REMAT)}"
            )

    @property
    def qk_dim(self) -> int:
        """Size of the queries, and of the keys, of all heads together: `NH * DHQK`."""
        return int(self.qk_dim_factor * self.embedding_dim)

    @property
    def v_dim(self) -> int:
        """Size of the values of all heads together: `NH * DHV`."""
        return int(self.v_dim_factor * self.embedding_dim)

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer."""
        return feed_forward_dim(
            self.embedding_dim, self.ffn_proj_factor, self.ffn_round_up_to_multiple_of
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Type of the computation."""
        return DTYPES[self.dtype]


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The model, the backend that computes its mLSTM layers, and how it uses a mesh."""

    model: ModelConfig = ModelConfig()
    backend: BackendConfig = BackendConfig()
    mesh: MeshConfig = MeshConfig()
