"""The check that all numbers of a configuration are finite."""

import dataclasses
import math
from typing import Any


def check_finite(prefix: str, config: Any) -> None:
    """Checks that no number in a configuration is infinite or NaN.

    Args:
        prefix: The prefix of field names in messages, such as `optimizer.`.
        config: A dataclass, whose fields may be numbers or tuples of numbers.

    Raises:
        ValueError: A number is not finite.
    """
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        numbers = {name: value}
        if isinstance(value, tuple):
            numbers = {f"{name}[{index}]": number for index, number in enumerate(value)}
        for name, number in numbers.items():
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}={number}: it must be a finite number")
