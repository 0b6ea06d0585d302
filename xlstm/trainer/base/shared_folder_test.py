import json
import os
import socket
import subprocess
import sys

from xlstm.trainer.base import shared_folder
from xlstm.trainer.base.shared_folder import check_shared_folder

_PROCESS = f"""
import json, sys
import jax
from {shared_folder.__name__} import check_shared_folder
import {shared_folder.__name__} as shared_folder

shared_folder._SECONDS = 2
address, index, *folders = sys.argv[1:]
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
    """What each process finds out about each of its folders."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, address, str(index), *map(str, folders)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        for index, folders in enumerate(folders_of_each)
    ]
    try:
        printed = [process.communicate(timeout=100)[0] for process in processes]
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
    left.touch()  # By a process that was killed.
    folders = [[tmp_path / "runs", tmp_path / "runs"], [tmp_path / "link", tmp_path / "other"]]
    for index, found in enumerate(_check_in_two_processes(*folders)):
        message = "process 1 of 2 does not see what the first process makes in {}: the folder of "
        assert found[0] == "shared"
        assert found[1].startswith(message.format(folders[index][1]))
    assert not os.listdir(tmp_path / "runs") and not os.listdir(tmp_path / "other")
