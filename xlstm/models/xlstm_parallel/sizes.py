"""Sizes that a configuration claims, compared with the numbers that there are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.visible_text import short_repr

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
