"""The configuration of a language model, and checks of its sizes."""

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

# Forget gates of the sLSTM.
FORGET_GATES = ("sigmoid", "exponential")

_MLSTM_BLOCKS = ("xlstm_7b", "xlstm_2024")
_SLSTM = "slstm"
_REMAT = ("none", "dots", "block")
_CAPS = ("gate_soft_cap", "output_logit_soft_cap")
_ANY_SIGN = ("igate_bias_init", "dropout")
_SIZE_LIMIT = 2**31  # Array indices have 32 bits.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the model; except for the sizes, the defaults are those of xLSTM-7B.

    The fields cover all kinds of blocks. A comment that starts with a kind (`xlstm_7b`,
    `xlstm_2024`, or mLSTM for both, or sLSTM) belongs to blocks of that kind alone.
    """

    block: str = "xlstm_7b"  # The mLSTM block: xlstm_7b (an mLSTM layer and a feed-forward layer)
    # or xlstm_2024 (one mLSTM layer in a wider space, from the 2024 paper).
    vocab_size: int = 256  # Number of token ids, V.
    embedding_dim: int = 128  # Size of the residual stream, D.
    num_blocks: int = 4  # Number of residual blocks.
    slstm_at: tuple[int, ...] = ()  # Indices of the sLSTM blocks, counted from 0. Set this or
    # ratio, not both.
    ratio: str = ""  # Ratio "[a:b]" of mLSTM to sLSTM blocks: the last b of every a + b blocks are
    # sLSTM blocks. "" makes all blocks mLSTM blocks.
    num_heads: int = 4  # Number of heads in each mLSTM and sLSTM layer, NH.
    qk_dim_factor: float = 0.5  # xlstm_7b: size of the queries, and of the keys, of all heads
    # together, as a factor of D.
    v_dim_factor: float = 1.0  # xlstm_7b: size of the values of all heads together, as a factor of
    # D.
    ffn_proj_factor: float = 2.667  # xlstm_7b: hidden size of the feed-forward layer, as a factor
    # of D.
    ffn_round_up_to_multiple_of: int = 64  # Hidden sizes of feed-forward layers are rounded up to a
    # multiple of this.
    inner_dim_factor: float = 2.0  # xlstm_2024: number of channels in the mLSTM layer, and size of
    # its queries, keys and values of all heads together, as a factor of D.
    conv_width: int = 4  # xlstm_2024 and sLSTM: number of tokens, including the current one, in the
    # convolution in front of the queries and keys, or, in sLSTM, the input and forget gates.
    qkv_block_size: int = 4  # xlstm_2024: number of channels mixed for a query, key or value.
    slstm_ffn_proj_factor: float = 4 / 3  # sLSTM: hidden size of the feed-forward layer, as a
    # factor of D.
    slstm_recurrent_scale: float = 1.0  # sLSTM: initial standard deviation of the recurrent
    # weights, times the square root of the channels of a head.
    slstm_forget_gate: str = "sigmoid"  # sLSTM: forget gate, sigmoid or exponential.
    gate_soft_cap: float = 15.0  # mLSTM: bound of the gate pre-activations; 0 disables it, as in
    # the 2024 paper.
    output_logit_soft_cap: float = 30.0  # Bound of the logits; 0 disables it, as in the 2024
    # paper.
    norm_eps: float = 1e-6  # Epsilon added to the variances in the norms.
    igate_bias_init: float = -10.0  # xlstm_7b: initial bias of the input gates; in xlstm_2024 the
    # initial biases are near 0.
    dropout: float = 0.0  # Dropout rate of the outputs of the embedding and of each layer.
    dtype: str = "float32"  # Compute type, float32 or bfloat16; parameters are always float32.
    matmul_precision: str = "highest"  # Precision of float32 products: highest (float32, 52 TFLOP/s
    # on an H100), high (TF32 on NVIDIA GPUs, 371 TFLOP/s, outputs off by 5e-4), or default (JAX's
    # setting, by itself the fastest: TF32, or bfloat16 on TPUs). CPUs always use float32, and
    # bfloat16 products do not change.
    remat: str = "dots"  # What the backward pass recomputes: none; dots (everything but the matmuls
    # of the dense layers); or block (everything).
    scan_unroll: int = 1  # Number of blocks in each step of the scan over blocks; a larger number
    # compiles more slowly.

    def __post_init__(self):
        check_finite("model.", self)
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and value < 1:
                raise ValueError(f"model.{name}={value}: it must be at least 1")
            if kind is int and value >= _SIZE_LIMIT:
                raise ValueError(f"model.{name}={short_repr(value)}: it must be below 2**31")
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
                raise ValueError(
                    f"model.{name}={value!r} is unknown; expected one of {', '.join(known)}"
                )

    def _check_slstm(self) -> None:
        if self.ratio and self.slstm_at:
            raise ValueError(
                f"model.ratio={self.ratio!r} and model.slstm_at={self.slstm_at} both select"
                " the sLSTM blocks; set only one of them"
            )
        if self.ratio and self.num_blocks % sum(parse_ratio(self.ratio)):
            raise ValueError(
                f"model.num_blocks={self.num_blocks} is not a multiple of the"
                f" {sum(parse_ratio(self.ratio))} blocks in model.ratio={self.ratio!r}"
            )
        at = self.slstm_at
        if any(not 0 <= number < self.num_blocks for number in at) or len(set(at)) < len(at):
            raise ValueError(
                f"model.slstm_at={at}: expected distinct indices from 0 to model.num_blocks - 1 ="
                f" {self.num_blocks - 1}"
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
                f" model.embedding_dim={self.embedding_dim}, which sLSTM blocks require"
            )
        head_dim = self.inner_dim // self.num_heads
        if is_wide and head_dim % self.qkv_block_size:
            raise ValueError(
                f"model.qkv_block_size={self.qkv_block_size} does not divide the {head_dim}"
                " channels of each head (model.inner_dim_factor * model.embedding_dim /"
                " model.num_heads)"
            )

    @functools.cached_property
    def pattern(self) -> BlockPattern:
        """Pattern of the kinds of blocks, which are the value of `block` and `slstm`."""
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
        """Channels of all heads together in the mLSTM layer of the block `xlstm_2024`."""
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
        """Hidden size of the feed-forward layer in mLSTM blocks; 0 if they have none."""
        if "xlstm_7b" not in self.pattern.counts:
            return 0
        return feed_forward_dim(
            self.embedding_dim, self.ffn_proj_factor, self.ffn_round_up_to_multiple_of
        )

    @property
    def slstm_ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer in sLSTM blocks; 0 without such blocks."""
        if _SLSTM not in self.pattern.counts:
            return 0
        return feed_forward_dim(
            self.embedding_dim, self.slstm_ffn_proj_factor, self.ffn_round_up_to_multiple_of
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Compute type, as a JAX dtype."""
        return DTYPES[self.dtype]

    @property
    def precision(self) -> lax.Precision | None:
        """Precision of float32 products, see `product_precision`."""
        return PRECISIONS[self.matmul_precision]


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Configuration of a model, of the backend of its mLSTM layers, and of its mesh."""

    model: ModelConfig = ModelConfig()
    backend: BackendConfig = BackendConfig()
    mesh: MeshConfig = MeshConfig()


_NO_SIZE = "scan_unroll"


def check_sizes(fields: Mapping[str, Any], num_numbers: int) -> None:
    """Checks that a model does not have more parameters than its files hold numbers.

    The check takes the same time and memory whatever the sizes, so it is safe for untrusted fields.

    Args:
        fields: Fields of a `ModelConfig` by name, with any values: a missing field has its default,
            and values that are not numbers are not checked.
        num_numbers: Number of numbers in the files of the model.

    Raises:
        ValueError: If the model is certainly larger.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    names = ["embedding_dim", *(x for x, default in defaults.items() if type(default) is int)]
    fields = {name: fields.get(name, default) for name, default in defaults.items()}
    width = max(fields["embedding_dim"], 1) if type(fields["embedding_dim"]) is int else 1
    # Every model has an embedding, a head, and a norm in each block. Every other size, and every
    # factor of the width, is the size of some parameter.
    least = {"embedding_dim": 1, "vocab_size": 2 * width, "num_blocks": width}
    most = {name: num_numbers // least.get(name, 1) for name in names if name != _NO_SIZE}
    most |= {name: num_numbers / width for name in fields if name.endswith("_factor")}
    for name, limit in most.items():
        if type(fields[name]) in (int, float) and fields[name] > limit:
            is_width = name == "embedding_dim"
            with_width = "" if is_width else f" with embedding_dim={short_repr(width)}"
            raise ValueError(
                f"{name}={short_repr(fields[name])}{with_width} is too large: the files of the"
                f" model hold {num_numbers:,} numbers at most"
            )
