import types

import numpy as np
import pytest

from xlstm.tools.benchmarks import peers
from xlstm.tools.benchmarks.candidates import Shape

SHAPE = Shape(1, 2, 128, 4, 6)


class FakeTensor:
    """What the timing needs of a tensor."""

    def __init__(self, values, dtype, device):
        self.values, self.dtype, self.device = values, dtype, device
        self.requires_grad = False

    def requires_grad_(self):
        self.requires_grad = True


class FakeCuda:
    """The memory of a GPU, on which each call needs 100 bytes and leaves 30."""

    def __init__(self, available):
        self.is_available = lambda: available
        self.waits, self.allocated, self.peak = 0, 1000, 5000

    def synchronize(self):
        self.waits += 1

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated + 30

    def max_memory_allocated(self):
        return self.peak + 100


class NoGradient:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def fake_torch(available=True):
    return types.SimpleNamespace(
        __version__="2.0",
        cuda=FakeCuda(available),
        float32="float32",
        bfloat16="bfloat16",
        tensor=FakeTensor,
        no_grad=NoGradient,
        autograd=types.SimpleNamespace(grad=lambda h, arguments, dh: [dh] * len(arguments)),
    )


@pytest.fixture
def packages(monkeypatch):
    """The packages that are installed, by name; all others are missing."""
    installed = {}

    def find(name):
        if name not in installed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return installed[name]

    monkeypatch.setattr(peers.importlib, "import_module", find)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "2.0.6")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return installed


def inputs():
    rng = np.random.default_rng(0)
    sizes = (4,), (4,), (6,), (), (), (6,)
    return [rng.standard_normal((2, 128, *size), np.float32) for size in sizes]


def test_missing_packages_are_named(packages):
    message = "--peers=mlstm_kernels needs the packages torch, triton and mlstm_kernels.*"
    with pytest.raises(ValueError, match=message + "'torch'"):
        peers.peer_candidates("mlstm_kernels", [64], SHAPE)
    packages |= {"torch": fake_torch(), "triton": None}
    with pytest.raises(ValueError, match=message + "'mlstm_kernels.torch'"):
        peers.peer_candidates("mlstm_kernels", [64], SHAPE)


def test_a_missing_gpu_is_named(packages):
    packages["torch"] = fake_torch(available=False)
    with pytest.raises(ValueError, match="needs a CUDA GPU, and torch 2.0 finds none"):
        peers.peer_candidates("mlstm_kernels", [64], SHAPE)


def test_a_kernel_gets_the_same_values_and_is_waited_for(packages):
    calls = []

    def kernel(q, k, v, i, f, **options):
        calls.append((q, v, i, options))
        return v

    torch, names = fake_torch(), []

    def get_mlstm_kernel(name):
        names.append(name)
        return kernel

    module = types.SimpleNamespace(get_mlstm_kernel=get_mlstm_kernel)
    packages |= {"torch": torch, "triton": None, "mlstm_kernels.torch": module}
    (candidate,) = peers.peer_candidates("mlstm_kernels", [32], SHAPE)
    arrays = inputs()
    passes = dict(candidate.timed_passes(arrays))
    assert names == ["chunkwise--triton_xl_chunk"]
    assert candidate.implementation == "triton_xl_chunk 2.0.6"
    q, v, i, options = calls[0]
    assert np.array_equal(q.values, arrays[0].reshape(1, 2, 128, 4))
    assert i.values.shape == (1, 2, 128) and v.device == "cuda" and i.dtype == "float32"
    assert q.requires_grad and v.requires_grad and i.requires_grad
    assert options["chunk_size"] == 32 and options["autocast_kernel_dtype"] == "float32"
    assert options["recompute_states_in_bw"] is False
    assert [x.temporary_memory for x in passes.values()] == [70, 70]
    count, waits = len(calls), torch.cuda.waits
    passes["forward_backward"].run(calls=3)
    assert (len(calls), torch.cuda.waits) == (count + 3, waits + 1)


def test_a_kernel_that_fails_is_named_with_its_shape(packages):
    def kernel(*arguments, **options):
        raise RuntimeError("out of shared memory")

    module = types.SimpleNamespace(get_mlstm_kernel=lambda name: kernel)
    packages |= {"torch": fake_torch(), "triton": None, "mlstm_kernels.torch": module}
    (candidate,) = peers.peer_candidates("mlstm_kernels", [64], SHAPE)
    message = "failed for --shapes=1x2x128x4x6 and chunk_size=64: RuntimeError: out of shared"
    with pytest.raises(ValueError, match=message):
        dict(candidate.timed_passes(inputs()))
