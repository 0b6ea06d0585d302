"""The Hugging Face format of xLSTM-7B models (`xLSTMForCausalLM`), mapped to our parameters.

Both formats hold the same numbers. In the Hugging Face format each block has its own tensors,
matrices are `(out, in)`, and `config.json` has the sizes, constants and kernels. This module reads
and writes no files.
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

# Fields of `config.json` with two names. If both are given, they must agree.
_OTHER_NAMES = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
_SIZES = ("vocab_size", "embedding_dim", "num_blocks", "num_heads")
_FACTORS = ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of")
_CONSTANTS = ("gate_soft_cap", "output_logit_soft_cap", "norm_eps")
# Fields that must have the value that our models have. A missing field has it.
_FIXED = {
    "use_bias": False,
    "norm_reduction_force_float32": True,
    "weight_mode": "single",
}
# Fields that `transformers` (since version 5) accepts and ignores: the value that says what it
# computes, and the tensor that it uses for any value.
_IGNORED = {
    "tie_word_embeddings": (False, "lm_head.weight"),
    "add_out_norm": (True, "backbone.out_norm.weight"),
}
_MODEL_TYPE = {"model_type": "xlstm"}
# `transformers` adds `eps` to the normalizer, we do not. Up to this value rounding hides it.
_MAX_EPS = 1e-6
# How `transformers` runs an exported model. Its defaults name its only kernel of each kind.
_COMPUTATION = {"mode": "inference", "use_cache": True}
# `transformers` rounds head sizes up to a multiple of this for its cache, but not in its layers.
_CACHE_ROUNDS_UP_TO = 64
# Replaces our chunk sizes -1, of the device, and 0, the whole sequence: `transformers` has neither.
_EXPORTED_CHUNK_SIZE = 64
_TYPES = typing.get_type_hints(ModelConfig)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face format.

    Attributes:
        name: Its name.
        shape: Its shape.
        parameter: The path of our parameter that contains it, joined by `.`.
        block: The index along that parameter's first axis; None if it is the whole parameter.
        is_transposed: Whether our matrix is its transpose.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    block: int | None
    is_transposed: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of our parameters, by its path joined by `.`."""
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
    """Returns the tensors of a model in the Hugging Face format, block after block.

    Args:
        shapes: The shapes of the model's parameters; see `parameter_shapes`.
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
    hf_config: Mapping[str, Any], num_elements: int
) -> tuple[ModelConfig, BackendConfig]:
    """Converts a `config.json` to our configuration.

    Fields that select kernels affect the speed only, and are ignored except for the chunk size.
    Unknown fields are ignored too.

    Args:
        hf_config: The content of `config.json`.
        num_elements: The number of elements of all tensors in the model's files.

    Returns:
        The configurations of the model and of its backend.

    Raises:
        ValueError: If the model is not an xLSTM, uses an unsupported feature, or is larger than its
            files.
    """
    _check_kind(hf_config)
    fields = {}
    for name in (*_SIZES, *_FACTORS, *_CONSTANTS):
        given = {
            x: _number(x, hf_config[x], _TYPES[name])
            for x in (name, _OTHER_NAMES.get(name))
            if hf_config.get(x) is not None
        }
        if len(set(given.values())) > 1:
            raise ValueError(
                f"{' and '.join(f'{x}={short_repr(y)}' for x, y in given.items())} contradict each"
                " other"
            )
        if given:
            fields[name] = next(iter(given.values()))
        elif name in _SIZES or name in hf_config:
            found = short_repr(hf_config[name]) if name in hf_config else "missing"
            raise ValueError(f"{name} is {found}: expected a number")
    _check_constants(fields)
    check_sizes(fields, num_elements)
    chunk_size = _number("chunk_size", hf_config.get("chunk_size", BackendConfig.chunk_size), int)
    return ModelConfig(**fields), BackendConfig(chunk_size=chunk_size)


def describe_ignored_fields(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Describes fields of a `config.json` that `transformers` and this project ignore.

    Args:
        hf_config: The content of `config.json`.

    Returns:
        A line for each field whose value differs from what the model computes.
    """
    return tuple(
        f"{name}={hf_config[name]} has no effect, as in transformers 5: {tensor} is used"
        for name, (value, tensor) in _IGNORED.items()
        if hf_config.get(name, value) != value
    )


def _check_kind(hf_config: Mapping[str, Any]) -> None:
    """Raises ValueError for a model with an unsupported feature."""
    for name, value in (_MODEL_TYPE | _FIXED).items():
        found = hf_config.get(name, None if name in _MODEL_TYPE else value)
        if found != value:
            raise ValueError(f"{name}={short_repr(found)} is not supported, only {value!r}")
    for name in _IGNORED:
        if not isinstance(hf_config.get(name, False), bool):
            raise ValueError(
                f"{name}={short_repr(hf_config[name])} is not supported: expected bool"
            )
    eps = _number("eps", hf_config.get("eps", _MAX_EPS), float)
    if not 0 <= eps <= _MAX_EPS:
        raise ValueError(f"eps={eps} is not supported, only 0 to {_MAX_EPS}")


def _check_constants(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a model without soft caps, which the Hugging Face format requires."""
    for name in _CONSTANTS:
        if name in fields and not fields[name] > 0:
            raise ValueError(f"{name}={fields[name]} is not supported: it must be positive")


def _number(name: str, value: Any, kind: type) -> int | float:
    if type(value) not in (int, kind) or (kind is float and abs(value) > sys.float_info.max):
        raise ValueError(f"{name}={short_repr(value)} is not supported: expected {kind.__name__}")
    return kind(value)


def to_hf_config(model: ModelConfig, backend: BackendConfig, dtype: str) -> dict[str, Any]:
    """Converts our configuration to a `config.json`, without the ids of special tokens.

    Args:
        model: The configuration of the model.
        backend: The configuration of the backend that it was trained with.
        dtype: Type of the tensors, `float32` or `bfloat16`.

    Returns:
        The content of `config.json`.

    Raises:
        ValueError: If the Hugging Face format does not support the model.
    """
    if model.block != "xlstm_7b":
        raise ValueError(
            f"the Hugging Face format does not support model.block={model.block}: expected xlstm_7b"
        )
    if "slstm" in model.pattern.counts:
        raise ValueError("the Hugging Face format does not support sLSTM blocks")
    if not backend.stabilize_correctly:
        raise ValueError(
            "the Hugging Face format does not support backend.stabilize_correctly=False: its"
            " implementations bound the normalizer by exp(-m)"
        )
    ours = {name: getattr(model, name) for name in (*_SIZES, *_FACTORS, *_CONSTANTS)}
    _check_constants(ours)
    others = {other: ours[name] for name, other in _OTHER_NAMES.items()}
    chunk_size = backend.chunk_size if backend.chunk_size > 0 else _EXPORTED_CHUNK_SIZE
    numerics = {"chunk_size": chunk_size, "dtype": dtype, "autocast_kernel_dtype": dtype}
    numerics["eps"] = _MAX_EPS
    architecture = {"architectures": ["xLSTMForCausalLM"]}
    computation = _COMPUTATION | _cache_sizes(model) | numerics
    return architecture | _MODEL_TYPE | ours | others | _FIXED | computation


def _cache_sizes(model: ModelConfig) -> dict[str, Any]:
    """Returns fields that correct the cache's head sizes in `transformers`, if it rounds them.

    Its configuration computes these sizes and has no fields for them. But it looks up every
    attribute under the name that `attribute_map` gives it.
    """
    sizes = {"qk_head_dim": model.qk_dim, "v_head_dim": model.v_dim}
    multiple, heads = _CACHE_ROUNDS_UP_TO, model.num_heads
    rounded = {name: -(-size // multiple) * multiple for name, size in sizes.items()}
    if all(rounded[name] // heads == size // heads for name, size in sizes.items()):
        return {}
    names = {name: f"cache_{name}" for name in sizes}
    return {"attribute_map": names} | {names[name]: sizes[name] // heads for name in sizes}
