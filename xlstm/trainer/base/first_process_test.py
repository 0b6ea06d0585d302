import json
import os
import socket
import subprocess
import sys

import pytest

from xlstm.trainer.base import first_process
from xlstm.trainer.base.first_process import from_first_process, wait_for_all

_PROCESS = f"""
import json, os, sys, time
import jax
from {first_process.__name__} import from_first_process, wait_for_all

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
print(json.dumps([*answers, sorted(os.listdir(folder))]))
"""


def test_one_process_answers_itself():
    wait_for_all("me")
    assert from_first_process(lambda: {1, 2}) == {1, 2}
    with pytest.raises(ZeroDivisionError):
        from_first_process(lambda: 1 / 0)


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
    for output, errors in printed:
        found = json.loads(output.splitlines()[-1]) if output else errors
        answer = {"who": 0, "long": "ü" * 1000}
        assert found == [answer, None, "the disk is full", ["0", "late"]]
