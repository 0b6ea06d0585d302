"""The configuration of a model."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from xlstm.common_types import DTYPES
from xlstm.distributed.mesh import MeshConfig
from xlstm.finite import check_finite
from xlstm.models.shared.feed_forward import feed_forward_dim
from xlstm.models.shared.precision import PRECISIONS
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.pattern import BlockPattern, find_pattern, parse_ratio
from xlstm.visible_text import short_repr

_MLSTM_BLOCKS = ("xlstm_7b", "xlstm_2024")
_SLSTM = "slstm"
FORGET_GATES = ("sigmoid", "exponential")  # Of the sLSTM.
_REMAT = ("none", "dots", "block")
_CAPS = ("gate_soft_cap", "output_logit_soft_cap")
_ANY_SIGN = ("igate_bias_init", "dropout")
_SIZE_LIMIT = 2**31  # Indices have 32 bits.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the model; the defaults are those of xLSTM-7B but for the sizes.

    These are the fields of all blocks; each takes those that it knows. The comments say which ones
    belong to one block alone.
    """

    block: str = "xlstm_7b"  # The mLSTM block: xlstm_7b, an mLSTM layer and a feed-forward
    # layer; xlstm_2024, that of the paper before it, one mLSTM layer in a wider space.
    vocab_size: int = 256  # Number of token ids, V.
    embedding_dim: int = 128  # Size of the residual stream, D.
    num_blocks: int = 4  # Number of residual blocks.
    slstm_at: tuple[int, ...] = ()  # Which of them, counted from 0, are sLSTM blocks; or instead
    ratio: str = ""  # "[a:b]": of a + b blocks in a row the last b are sLSTM blocks; "": none is.
    num_heads: int = 4  # Number of mLSTM heads, and of sLSTM heads, NH.
    qk_dim_factor: float = 0.5  # xlstm_7b: queries and keys of all heads together have this factor
    # times D.
    v_dim_factor: float = 1.0  # xlstm_7b: values of all heads together have this factor times D.
    ffn_proj_factor: float = 2.667  # xlstm_7b: the feed-forward layer's hidden size is this factor
    # times D,
    ffn_round_up_to_multiple_of: int = 64  # Hidden sizes are rounded up to a multiple of this.
    inner_dim_factor: float = 2.0  # xlstm_2024: the layer has this factor times D channels, as have
    # its queries, keys and values, of all heads together.
    conv_width: int = 4  # xlstm_2024: tokens that a token's queries and keys see, itself included;
    # in sLSTM blocks, its input and forget gates.
    qkv_block_size: int = 4  # xlstm_2024: channels that are mixed for a query, key or value.
    slstm_ffn_proj_factor: float = 4 / 3  # sLSTM: as ffn_proj_factor, rounded up as well.
    slstm_recurrent_scale: float = 1.0  # sLSTM: initial recurrent weights have this deviation, over
    # the root of a head's channels.
    slstm_forget_gate: str = "sigmoid"  # sLSTM: sigmoid or exponential.
    gate_soft_cap: float = 15.0  # mLSTM: bound of the gate pre-activations; 0 for none, as in 2024.
    output_logit_soft_cap: float = 30.0  # Bound of the logits; 0 for none, as in 2024.
    norm_eps: float = 1e-6  # Added to the variances in the norms.
    igate_bias_init: float = -10.0  # xlstm_7b: initial bias of the input gates. (In xlstm_2024 they
    # are near 0.)
    dropout: float = 0.0  # Share of the embedding's and of each layer's outputs that is dropped.
    dtype: str = "float32"  # Type of the computation, float32 or bfloat16; parameters are float32.
    matmul_precision: str = "highest"  # How float32 is multiplied: highest, in float32 (52 TFLOP/s
    # on an H100); high, less exactly, in TF32 on NVIDIA GPUs (371 TFLOP/s, outputs off by 5e-4);
    # default, as JAX is set to, by itself the fastest way, in TF32 or on TPUs in bfloat16. A CPU
    # always multiplies in float32, and bfloat16 is multiplied as it is.
    remat: str = "dots"  # What the backward pass computes again: none; dots, all but the matmuls of
    # the dense layers; block, everything.
    scan_unroll: int = 1  # Blocks that a step of the scan over blocks holds; compiles slower.

    def __post_init__(self):
        check_finite("model.", self)
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and value < 1:
                raise ValueError(f"model.{name}={value}: it must be at least 1")
            if kind is int and value >= _SIZE_LIMIT:
                raise ValueError(f"model.{name} must be below 2**31")
            if name in _CAPS and not value >= 0:
                raise ValueError(f"model.{name}={value}: it must be positive, or 0 for none")
            if kind is float and name not in _ANY_SIGN + _CAPS and not value > 0:
                raise ValueError(f"model.{name}={value}: it must be positive")
            if name.endswith("_factor") and value * self.embedding_dim >= _SIZE_LIMIT:
                raise ValueError(
                    f"model.{name}={value}: {name} * model.embedding_dim must be below 2**31"
                )
        self._check_names()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: it must be at least 0 and below 1")
        self._check_slstm()
        self._check_head_sizes()

    def _check_names(self) -> None:
        for name, known in [
            ("block", _MLSTM_BLOCKS),
            ("slstm_forget_gate", FORGET_GATES),
            ("dtype", DTYPES),
            ("matmul_precision", PRECISIONS),
            ("remat", _REMAT),
        ]:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"model.{name}={value!r} is unknown; there are {', '.join(known)}")

    def _check_slstm(self) -> None:
        if self.ratio and self.slstm_at:
            raise ValueError(
                f"model.ratio={self.ratio!r} and model.slstm_at={self.slstm_at} both say which"
                " blocks are sLSTM blocks: give one of them"
            )
        if self.ratio and self.num_blocks % sum(parse_ratio(self.ratio)):
            raise ValueError(
                f"model.num_blocks={self.num_blocks} is no multiple of the"
                f" {sum(parse_ratio(self.ratio))} blocks of model.ratio={self.ratio!r}"
            )
        at = self.slstm_at
        if any(not 0 <= number < self.num_blocks for number in at) or len(set(at)) < len(at):
            raise ValueError(
                f"model.slstm_at={at}: they must be different numbers from 0 to"
                f" model.num_blocks - 1 = {self.num_blocks - 1}"
            )

    def _check_head_sizes(self) -> None:
        kinds = self.pattern.counts
        is_wide = "xlstm_2024" in kinds
        names = {"xlstm_7b": ("qk_dim", "v_dim"), "xlstm_2024": ("inner_dim",)}
        for name in names[self.block] if self.block in kinds else ():
            size = getattr(self, name)
            if size % self.num_heads or size < self.num_heads:
                raise ValueError(
                    f"model.num_heads={self.num_heads} does not divide {name} = {size}"
                    f" (model.{name}_factor * model.embedding_dim)"
                )
        if _SLSTM in kinds and self.embedding_dim % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide"
                f" model.embedding_dim={self.embedding_dim}, as sLSTM blocks need"
            )
        head_dim = self.inner_dim // self.num_heads
        if is_wide and head_dim % self.qkv_block_size:
            raise ValueError(
                f"model.qkv_block_size={self.qkv_block_size} does not divide the {head_dim}"
                " channels of a head (model.inner_dim_factor * model.embedding_dim /"
                " model.num_heads)"
            )

    @functools.cached_property
    def pattern(self) -> BlockPattern:
        """The kinds of the blocks: that of the field `block`, and `slstm`."""
        if self.ratio:
            num_mlstm, num_slstm = parse_ratio(self.ratio)
            kinds = [self.block] * num_mlstm + [_SLSTM] * num_slstm
            return find_pattern(kinds, self.num_blocks // len(kinds))
        if not self.slstm_at:
            return find_pattern([self.block], self.num_blocks)
        at = set(self.slstm_at)
        return find_pattern([_SLSTM if n in at else self.block for n in range(self.num_blocks)])

    @property
    def inner_dim(self) -> int:
        """Channels of the mLSTM layer of the block `xlstm_2024`, of all heads together."""
        return int(self.inner_dim_factor * self.embedding_dim)

    @property
    def qk_dim(self) -> int:
        """Size of the queries, and of the keys, of all heads together: `NH * DHQK`."""
        if self.block == "xlstm_2024":
            return self.inner_dim
        return int(self.qk_dim_factor * self.embedding_dim)

    @property
    def v_dim(self) -> int:
        """Size of the values of all heads together: `NH * DHV`."""
        if self.block == "xlstm_2024":
            return self.inner_dim
        return int(self.v_dim_factor * self.embedding_dim)

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer of the mLSTM blocks; 0 where they have none."""
        if "xlstm_7b" not in self.pattern.counts:
            return 0
        return feed_forward_dim(
            self.embedding_dim, self.ffn_proj_factor, self.ffn_round_up_to_multiple_of
        )

    @property
    def slstm_ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer of the sLSTM blocks; 0 where there are none."""
        if _SLSTM not in self.pattern.counts:
            return 0
        return feed_forward_dim(
            self.embedding_dim, self.slstm_ffn_proj_factor, self.ffn_round_up_to_multiple_of
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Type of the computation."""
        return DTYPES[self.dtype]

    @property
    def precision(self) -> lax.Precision | None:
        """How exactly float32 is multiplied, see `product_precision`."""
        return PRECISIONS[self.matmul_precision]


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The model, the backend that computes its mLSTM layers, and how it uses a mesh."""

    model: ModelConfig = ModelConfig()
    backend: BackendConfig = BackendConfig()
    mesh: MeshConfig = MeshConfig()


_NO_SIZE = "scan_unroll"


def check_sizes(fields: Mapping[str, Any], num_numbers: int) -> None:
    """Checks that the parameters of a model are not more than the numbers that there are.

    Nothing is made of the sizes before, so that neither time nor memory depends on them.

    Args:
        fields: The fields of a `ModelConfig` by name, which may be anything: those that are missing
            have their defaults, and what is no number is left to others to refuse.
        num_numbers: How many numbers the files of the model hold.

    Raises:
        ValueError: If the model would certainly be larger.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    names = ["embedding_dim", *(x for x, default in defaults.items() if type(default) is int)]
    fields = {name: fields.get(name, default) for name, default in defaults.items()}
    width = max(fields["embedding_dim"], 1) if type(fields["embedding_dim"]) is int else 1
    # Every model has an embedding, a head, and in each block a norm; what else is a size, or a
    # factor of the width, is that of a parameter.
    least = {"embedding_dim": 1, "vocab_size": 2 * width, "num_blocks": width}
    most = {name: num_numbers // least.get(name, 1) for name in names if name != _NO_SIZE}
    most |= {name: num_numbers / width for name in fields if name.endswith("_factor")}
    for name, limit in most.items():
        if type(fields[name]) in (int, float) and fields[name] > limit:
            beside = f" with embedding_dim={short_repr(width)}" if name != "embedding_dim" else ""
            raise ValueError(
                f"{name}={short_repr(fields[name])}{beside} is too large: the files of the"
                f" model hold {num_numbers:,} numbers at most"
            )
