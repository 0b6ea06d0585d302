import dataclasses
import math

import pytest

from xlstm.finite import check_finite


@dataclasses.dataclass(frozen=True)
class _Config:
    number: float = 1.0
    numbers: tuple[float, ...] = (1e308, -1e308)
    count: int = 10**400
    name: str = "nan"
    names: tuple[str, ...] = ("inf",)


def test_finite_numbers_and_other_values_pass():
    check_finite("", _Config())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_others_are_named(value):
    with pytest.raises(ValueError, match=rf"^a\.number={value}: it must be a finite number$"):
        check_finite("a.", _Config(number=value))
    with pytest.raises(ValueError, match=rf"^numbers\[1\]={value}: it must be a finite number$"):
        check_finite("", _Config(numbers=(0.0, value)))
