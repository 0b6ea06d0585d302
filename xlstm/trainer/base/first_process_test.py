import json
import os
import socket
import subprocess
import sys

import pytest

from xlstm.trainer.base import first_process
from xlstm.trainer.base.first_process import (
    failing_together,
    from_first_process,
    in_first_process,
    wait_for_all,
)

_PROCESS = f"""
import concurrent.futures, json, os, sys, time
import jax
from {first_process.__name__} import (
    failing_together, from_first_process, in_first_process, wait_for_all
)

address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)

def slow():
    time.sleep(0.5)
    open(os.path.join(folder, str(index)), "w").close()
    return {{"who": index, "long": "ü" * 1000}}

def fail():
    raise OSError("the disk is full")

answers = [from_first_process(slow), from_first_process(lambda: None)]
try:
    from_first_process(fail)
except OSError as error:
    answers.append(str(error))
if index == 0:
    time.sleep(0.5)
    open(os.path.join(folder, "late"), "w").close()
wait_for_all("late")
wait_for_all("late")

def fail_in_one(process, error):
    with failing_together():
        if index == process:
            raise error

def in_thread(function):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return pool.submit(in_first_process, "thread", function).result()

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
    wait_for_all("me")
    assert from_first_process(lambda: {1, 2}) == {1, 2}
    for call in (from_first_process, lambda function: in_first_process("me", function)):
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 / 0)
    with pytest.raises(OSError, match="it is mine"), failing_together():
        raise OSError("it is mine")


def test_the_first_process_answers_for_all(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, address, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (output, errors) in enumerate(printed):
        found = json.loads(output.splitlines()[-1]) if output else errors
        answer = {"who": 0, "long": "ü" * 1000}
        together = ["it is mine", "process 1 of 2 failed, and says why"]
        if index == 1:
            together = ["process 0 of 2 failed, and says why", "it is mine"]
        errors = ["the disk is full", "division by zero", *together]
        assert found[:2] == [answer, None]
        assert found[2:] == ["the disk is full", 0, *errors, ["0", "late", "once"]]
