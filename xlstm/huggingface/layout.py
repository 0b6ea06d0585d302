"""The public layout of xLSTM-7B models, Hugging Face's `xLSTMForCausalLM`, and ours.

Both hold the same numbers. There, every block's tensors have names of their own, matrices are
`(out, in)`, and `config.json` names sizes, constants and kernels. Nothing here touches a file.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig, check_sizes
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.visible_text import short_repr

# Their `config.json` has two names for two of our fields; where it has both, they must agree.
_OTHER_NAMES = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
_SIZES = ("vocab_size", "embedding_dim", "num_blocks", "num_heads")
_FACTORS = ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of")
_CONSTANTS = ("gate_soft_cap", "output_logit_soft_cap", "norm_eps")
# What a model of ours always is; a field that is missing there means the same.
_FIXED = {
    "use_bias": False,
    "norm_reduction_force_float32": True,
    "weight_mode": "single",
}
# Fields that `transformers` (from version 5 on) knows and does not use: what they have to be to say
# what it computes, and the tensor that it takes whatever they say.
_WITHOUT_EFFECT = {
    "tie_word_embeddings": (False, "lm_head.weight"),
    "add_out_norm": (True, "backbone.out_norm.weight"),
}
_MODEL_TYPE = {"model_type": "xlstm"}
# They add `eps` to the normalizer, we add nothing; so little is lost in rounding.
_MAX_EPS = 1e-6
# How an exported model runs. Fields that choose kernels are left out: `transformers` has one of
# each kind, which its defaults name.
_COMPUTATION = {"mode": "inference", "use_cache": True}
# The configuration of `transformers` rounds these sizes up for its cache, but its layers do not.
_CACHE_ROUNDS_UP_TO = 64
_TYPES = typing.get_type_hints(ModelConfig)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor of the public layout.

    Attributes:
        name: Its name there.
        shape: Its shape there.
        parameter: The path of our parameter that it belongs to, the parts joined by `.`.
        block: The index along that parameter's first axis; None if it is all of the parameter.
        is_transposed: Whether our matrix is its transpose.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    block: int | None
    is_transposed: bool

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by their paths, the parts joined by `.`."""
    init = xLSTMLMModel(LanguageModelConfig(model)).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): box.value.shape
        for path, box in leaves
    }


def hf_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[HFTensor]:
    """All tensors that the public layout has for a model, block after block.

    Args:
        shapes: The shapes of the model's parameters, see `parameter_shapes`.

    Returns:
        The tensors.
    """
    blocks = {path: shape for path, shape in shapes.items() if path.startswith("blocks.")}
    others = [_tensor(path, shapes[path], None) for path in sorted(shapes.keys() - blocks.keys())]
    num_blocks = next(iter(blocks.values()))[0]
    stacks = [
        _tensor(path, shape[1:], block)
        for block in range(num_blocks)
        for path, shape in blocks.items()
    ]
    return others + stacks


def _tensor(path: str, shape: tuple[int, ...], block: int | None) -> HFTensor:
    *modules, leaf = path.split(".")
    if block is not None:
        modules.insert(1, str(block))
    if modules[0] != "lm_head":
        modules.insert(0, "backbone")
    is_transposed = leaf == "kernel"
    name = ".".join([*modules, _LEAVES[leaf]])
    return HFTensor(name, shape[::-1] if is_transposed else shape, path, block, is_transposed)


def from_hf_config(
    published: Mapping[str, Any], num_numbers: int
) -> tuple[ModelConfig, BackendConfig]:
    """Reads the content of a `config.json`.

    Fields about kernels are left aside, since they change the speed alone; only the chunk size is
    taken over. So are fields that the public implementation does not know.

    Args:
        published: The content.
        num_numbers: How many numbers the model's files hold.

    Returns:
        The model, and the backend to compute it with.

    Raises:
        ValueError: If it is of no such model, or of one that ours cannot be, or larger than the
            files are.
    """
    _check_kind(published)
    fields = {}
    for name in (*_SIZES, *_FACTORS, *_CONSTANTS):
        given = {
            x: _number(x, published[x], _TYPES[name])
            for x in (name, _OTHER_NAMES.get(name))
            if published.get(x) is not None
        }
        if len(set(given.values())) > 1:
            raise ValueError(
                f"{' and '.join(f'{x}={short_repr(y)}' for x, y in given.items())} contradict"
            )
        if given:
            fields[name] = next(iter(given.values()))
        elif name in _SIZES or name in published:
            found = short_repr(published[name]) if name in published else "missing"
            raise ValueError(f"{name} is {found}: expected a number")
    _check_constants(fields)
    check_sizes(fields, num_numbers)
    chunk_size = _number("chunk_size", published.get("chunk_size", BackendConfig.chunk_size), int)
    return ModelConfig(**fields), BackendConfig(chunk_size=chunk_size)


def demands_without_effect(published: Mapping[str, Any]) -> tuple[str, ...]:
    """Names what a `config.json` demands and `transformers` does not do, nor do we.

    Args:
        published: The content.

    Returns:
        A line for each such field: what is computed in spite of it.
    """
    return tuple(
        f"{name}={published[name]} has no effect, as in transformers 5: {tensor} is used"
        for name, (value, tensor) in _WITHOUT_EFFECT.items()
        if published.get(name, value) != value
    )


def _check_kind(published: Mapping[str, Any]) -> None:
    """Raises ValueError for a model that differs from ours by more than its numbers."""
    for name, value in (_MODEL_TYPE | _FIXED).items():
        found = published.get(name, None if name in _MODEL_TYPE else value)
        if found != value:
            raise ValueError(f"{name}={short_repr(found)} is not supported, only {value!r}")
    for name in _WITHOUT_EFFECT:
        if not isinstance(published.get(name, False), bool):
            raise ValueError(
                f"{name}={short_repr(published[name])} is not supported: expected bool"
            )
    eps = _number("eps", published.get("eps", _MAX_EPS), float)
    if not 0 <= eps <= _MAX_EPS:
        raise ValueError(f"eps={eps} is not supported, only 0 to {_MAX_EPS}")


def _check_constants(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a model without soft caps: ours may be, theirs always has them."""
    for name in _CONSTANTS:
        if name in fields and not fields[name] > 0:
            raise ValueError(f"{name}={fields[name]} is not supported: it must be positive")


def _number(name: str, value: Any, kind: type) -> int | float:
    if type(value) not in (int, kind) or (kind is float and abs(value) > sys.float_info.max):
        raise ValueError(f"{name}={short_repr(value)} is not supported: expected {kind.__name__}")
    return kind(value)


def to_hf_config(model: ModelConfig, backend: BackendConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json`, but for the ids of special tokens.

    Args:
        model: The model.
        backend: What it was trained with.
        dtype: Type of the tensors, `float32` or `bfloat16`.

    Returns:
        What JSON can hold.

    Raises:
        ValueError: If the public layout has no such model.
    """
    # Whatever the layout has no names for is refused here.
    if model.block != "xlstm_7b":
        raise ValueError(
            f"the public layout has no place for the block {model.block}, only for xlstm_7b"
        )
    if "slstm" in model.pattern.counts:
        raise ValueError("the public layout has no place for sLSTM blocks")
    if not backend.stabilize_correctly:
        raise ValueError(
            "the public layout has no place for a model with backend.stabilize_correctly=False:"
            " its implementations bound the normalizer by exp(-m)"
        )
    ours = {name: getattr(model, name) for name in (*_SIZES, *_FACTORS, *_CONSTANTS)}
    _check_constants(ours)
    others = {other: ours[name] for name, other in _OTHER_NAMES.items()}
    # A chunk of the whole sequence is not known there.
    chunk_size = backend.chunk_size or BackendConfig.chunk_size
    numerics = {"chunk_size": chunk_size, "dtype": dtype, "autocast_kernel_dtype": dtype}
    numerics["eps"] = _MAX_EPS
    architecture = {"architectures": ["xLSTMForCausalLM"]}
    computation = _COMPUTATION | _cache_sizes(model) | numerics
    return architecture | _MODEL_TYPE | ours | others | _FIXED | computation


def _cache_sizes(model: ModelConfig) -> dict[str, Any]:
    """The fields that make the cache of `transformers` fit, where it would not.

    Its configuration computes the sizes of a head in the cache, and has no field for them. But it
    looks every attribute up by the name that `attribute_map` has for it.
    """
    sizes = {"qk_head_dim": model.qk_dim, "v_head_dim": model.v_dim}
    multiple, heads = _CACHE_ROUNDS_UP_TO, model.num_heads
    rounded = {name: -(-size // multiple) * multiple for name, size in sizes.items()}
    if all(rounded[name] // heads == size // heads for name, size in sizes.items()):
        return {}
    names = {name: f"cache_{name}" for name in sizes}
    return {"attribute_map": names} | {names[name]: sizes[name] // heads for name in sizes}
