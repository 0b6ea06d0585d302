"""The kernels in Pallas's interpreter, over lengths and sizes of heads; takes minutes."""

import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import mosaic_testing


@pytest.mark.skipif(
    not mosaic_testing.has_interpreter(), reason="needs the interpreter of jax 0.12"
)
@pytest.mark.parametrize("dims", ["64x128", "128x256", "256x512", "40x72"])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200, 512, 513])  # 512: two segments.
def test_interpreted_kernels_compute_the_mlstm(time, dims):
    mosaic_testing.assert_kernels_solve(time, *map(int, dims.split("x")))
