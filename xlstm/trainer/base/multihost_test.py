"""Tests of the coordination of processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.testing.patience import PATIENCE
from xlstm.trainer.base import multihost
from xlstm.trainer.base.multihost import (
    Request,
    Requests,
    broadcast_from_process_0,
    check_shared_folder,
    raise_on_all_processes,
    run_on_process_0,
    sync_processes,
)

_STEPS_TOGETHER = f"""
import concurrent.futures, json, os, sys, time
import jax
from {multihost.__name__} import (
    raise_on_all_processes, broadcast_from_process_0, run_on_process_0, sync_processes
)

address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(address, 2, index)

def slow():
    time.sleep(0.5)
    open(os.path.join(folder, str(index)), "w").close()
    return {{"who": index, "long": "ü" * 1000}}

def fail():
    raise OSError("the disk is full")

answers = [broadcast_from_process_0(slow), broadcast_from_process_0(lambda: None)]
try:
    broadcast_from_process_0(fail)
except OSError as error:
    answers.append(str(error))
if index == 0:
    time.sleep(0.5)
    open(os.path.join(folder, "late"), "w").close()
sync_processes("late")
sync_processes("late")

def fail_in_one(process, error):
    with raise_on_all_processes():
        if index == process:
            raise error

def in_thread(function):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return pool.submit(run_on_process_0, "thread", function).result()

answers.append(in_thread(lambda: index))
in_thread(lambda: open(os.path.join(folder, "once"), "x").close())
fail_in_one(2, OSError("nobody"))
for function in (
    lambda: in_thread(fail),
    lambda: in_thread(lambda: 1 / 0),
    lambda: fail_in_one(0, OSError("it is mine")),
    lambda: fail_in_one(1, OSError("it is mine")),
):
    try:
        function()
        answers.append("no error")
    except (OSError, ZeroDivisionError) as error:
        answers.append(str(error))
print(json.dumps([*answers, sorted(os.listdir(folder))]))
"""


def test_one_process_answers_itself():
    sync_processes("me")
    assert broadcast_from_process_0(lambda: {1, 2}) == {1, 2}
    for call in (broadcast_from_process_0, lambda function: run_on_process_0("me", function)):
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 / 0)
    with pytest.raises(OSError, match="it is mine"), raise_on_all_processes():
        raise OSError("it is mine")


def test_the_first_process_answers_for_all(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _STEPS_TOGETHER, address, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (output, errors) in enumerate(printed):
        found = json.loads(output.splitlines()[-1]) if output else errors
        answer = {"who": 0, "long": "ü" * 1000}
        together = ["it is mine", "process 1 of 2 failed: see its message"]
        if index == 1:
            together = ["process 0 of 2 failed: see its message", "it is mine"]
        errors = ["the disk is full", "division by zero", *together]
        assert found[:2] == [answer, None]
        assert found[2:] == ["the disk is full", 0, *errors, ["0", "late", "once"]]


_FOLDERS_TOGETHER = f"""
import json, sys
import jax
from {multihost.__name__} import check_shared_folder
import {multihost.__name__} as multihost

multihost._MARKER_SECONDS = 2
address, index, *folders = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(address, 2, int(index))
found = []
for folder in folders:
    try:
        check_shared_folder(folder)
        found.append("shared")
    except OSError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def _check_in_two_processes(*folders_of_each):
    """Returns the result of `check_shared_folder` in each process for each of its folders."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FOLDERS_TOGETHER, address, str(index), *map(str, folders)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index, folders in enumerate(folders_of_each)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.splitlines()[-1]) for output in printed]


def test_one_process_sees_its_folder(tmp_path):
    check_shared_folder(str(tmp_path))
    assert not os.listdir(tmp_path)


def test_two_names_of_a_folder_are_one_and_two_folders_are_not(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("runs")
    left = tmp_path / "runs" / ".seen_by_all_processes.0"
    left.touch()  # As a killed process leaves it.
    folders = [[tmp_path / "runs", tmp_path / "runs"], [tmp_path / "link", tmp_path / "other"]]
    for index, found in enumerate(_check_in_two_processes(*folders)):
        message = "process 1 of 2 does not see a file that process 0 created in {}: the run's "
        assert found[0] == "shared"
        assert found[1].startswith(message.format(folders[index][1]))
    assert not os.listdir(tmp_path / "runs") and not os.listdir(tmp_path / "other")


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
