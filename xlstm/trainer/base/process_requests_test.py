import jax
import numpy as np
import pytest

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.process_requests import Request, Requests


@pytest.fixture
def requests():
    return Requests(create_mesh(MeshConfig(dp=2, fsdp=2, tp=2)))


def _current(requests):
    array = requests.current()
    assert array.shape == (8,) and len(array.addressable_shards) == 8
    (request,) = set(np.asarray(array).tolist())
    return Request(request)


def test_a_request_stands_until_it_is_answered(requests):
    assert _current(requests) == Request.NONE
    requests.ask(Request.CHECKPOINT)
    requests.answered(Request.NONE)
    assert [_current(requests) for _ in range(2)] == [Request.CHECKPOINT] * 2
    requests.answered(Request.CHECKPOINT)
    assert _current(requests) == Request.NONE


def test_a_request_is_not_answered_by_a_lesser_one(requests):
    requests.ask(Request.STOP)
    requests.answered(Request.CHECKPOINT)
    assert _current(requests) == Request.STOP


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0)])
def test_of_several_the_largest_counts(requests, first, second):
    asked = [Request.CHECKPOINT, Request.STOP]
    requests.ask(asked[first])
    requests.ask(asked[second])
    assert _current(requests) == Request.STOP


def test_to_ask_for_nothing_costs_no_transfer(requests):
    arrays = [requests.current() for _ in range(2)]
    with jax.transfer_guard("disallow"):
        assert requests.current() is arrays[0] is arrays[1]
