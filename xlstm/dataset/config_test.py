import pytest

from xlstm.dataset.config import DataConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stores": ()}, "data.stores is empty"),
        ({"context_length": 0}, "at least 1, but are 0 and 16"),
        ({"batch_size": 0}, "at least 1, but are 256 and 0"),
        ({"validation_fraction": 1.0}, r"in \[0, 1\), but is 1.0"),
        ({"validation_fraction": -0.1}, r"in \[0, 1\), but is -0.1"),
        (
            {"validation_fraction": float("nan")},
            "validation_fraction=nan: it must be a finite number",
        ),
        ({"seed": -1}, "negative, but is -1"),
        ({"shuffle": "none"}, "'none' is unknown: choose one of permutation, grain, contiguous"),
        (
            {"carry_state": True},
            "data.carry_state=True continues each row in its next batch, which"
            " data.shuffle='permutation' does not keep in order: set data.shuffle='contiguous'",
        ),
        ({"carry_state": True, "shuffle": "grain"}, "which data.shuffle='grain' does not keep"),
        (
            {"carry_state": True, "shuffle": "contiguous", "task": "parity"},
            "data.carry_state=True continues the documents of stores, but the examples of"
            " data.task='parity' end in their rows: set data.carry_state=False",
        ),
        (
            {"shuffle": "contiguous", "task": "parity"},
            "data.shuffle='contiguous' reads stores in order, but data.task='parity' has none: set"
            " data.shuffle='permutation'",
        ),
        (
            {"shuffle": "contiguous", "stores": ("a", "b"), "weights": (1.0, 2.0)},
            "data.shuffle='contiguous' reads one store after the other, which"
            r" data.weights=\(1.0, 2.0\) would mix: leave data.weights empty",
        ),
        (
            {"shuffle": "contiguous", "ramp_batch_sizes": (4,), "ramp_steps": (9,)},
            r"data.shuffle='contiguous' needs a constant batch size, but data.ramp_batch_sizes="
            r"\(4,\) changes it: leave data.ramp_batch_sizes and data.ramp_steps empty",
        ),
        ({"weights": (1.0, 2.0)}, "has 2 numbers for 1 stores"),
        ({"stores": ("a", "b"), "weights": (1.0, -1.0)}, r"are \(1.0, -1.0\)"),
        ({"stores": ("a", "b"), "weights": (0.0, 0.0)}, r"are \(0.0, 0.0\)"),
        (
            {"stores": ("a", "b"), "weights": (1.0, float("inf"))},
            r"weights\[1\]=inf: it must be a fin",
        ),
        (
            {"stores": ("a", "b"), "weights": (1.0, float("nan"))},
            r"weights\[1\]=nan: it must be a fin",
        ),
        ({"ramp_batch_sizes": (4,)}, "has 1 numbers and data.ramp_steps 0"),
        ({"ramp_batch_sizes": (0,), "ramp_steps": (9,)}, r"=16, but are \(0,\)"),
        ({"ramp_batch_sizes": (8, 17), "ramp_steps": (9, 9)}, r"=16, but are \(8, 17\)"),
        ({"ramp_batch_sizes": (8, 12), "ramp_steps": (9, 0)}, r"1 each, but are \(9, 0\)"),
        ({"validation_stores": ("wiki",)}, "has 'wiki': expected name=path"),
        ({"validation_stores": ("=wiki",)}, "has '=wiki': expected name=path"),
        ({"validation_stores": ("wiki=",)}, "has 'wiki=': expected name=path"),
        ({"validation_stores": ("wi-ki=a",)}, "name of letters, digits and _"),
        ({"validation_stores": ("a=b", "a=c")}, "names a, a: expected distinct names"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_good_values():
    assert DataConfig().stores == ("stdlib",)
    config = DataConfig(stores=("a", "b"), weights=(0.0, 3.0), validation_fraction=0.0)
    assert config.weights == (0.0, 3.0)
    config = DataConfig(ramp_batch_sizes=(8, 16), ramp_steps=(1, 100))
    assert config.ramp_steps == (1, 100)
    config = DataConfig(validation_stores=("wiki_1=/data/wiki", "b=/data/a=b"))
    assert config.validation_paths == {"wiki_1": "/data/wiki", "b": "/data/a=b"}
    assert DataConfig(shuffle="contiguous").carry_state is False
    assert DataConfig(shuffle="contiguous", carry_state=True).carry_state is True
