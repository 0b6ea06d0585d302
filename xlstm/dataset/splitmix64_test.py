import numpy as np
import pytest

from xlstm.dataset.splitmix64 import splitmix64


def test_the_published_outputs():
    # From seed 1234567, as its authors' C code prints them.
    found = [splitmix64(1234567, index) for index in range(5)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_arrays_are_as_ints(seed):
    indices = [0, 1, 2**31, 2**63, 2**64 - 1]
    expected = [splitmix64(seed, index) for index in indices]
    arrays = np.array(indices, np.uint64)
    assert splitmix64(seed, arrays).dtype == np.uint64
    assert splitmix64(seed, arrays).tolist() == expected
    assert splitmix64(np.full(5, seed, np.uint64), arrays).tolist() == expected
