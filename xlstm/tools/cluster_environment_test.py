"""Tests of the environment variables of schedulers, as SLURM 22.05 and Open MPI 4.1 set them."""

import os

import pytest

from xlstm.tools.cluster_environment import Cluster, find_cluster

_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
}
_BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
_OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "453246976.0;tcp://10.0.0.2:41475;tcp6://[fd00::2]:34315",
}
# mpirun in a job has srun start one daemon per node; its processes inherit the daemon's variables.
_DAEMON = _SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
_JAX = {
    "JAX_COORDINATOR_ADDRESS": "first:123",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture
def found(monkeypatch):
    """A function that finds the cluster in exactly these variables, and those of no scheduler."""
    schedulers = ("SLURM", "OMPI_", "PMI", "JAX_", "KUBERNETES_", "TPU_", "CUDA_")
    for name in os.environ:
        if name.startswith(schedulers):
            monkeypatch.delenv(name)

    def found(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find_cluster(seconds=1)

    return found


@pytest.mark.parametrize(
    "environment, address, devices",
    [
        (_SLURM, f"node08:{61440 + 7}", [1]),
        (_SLURM | {"JAX_COORDINATOR_PORT": "99"}, "node08:99", [1]),
        (_SLURM | {"JAX_COORDINATOR_ADDRESS": "other:5"}, "other:5", [1]),
        (_SLURM | _JAX, "first:123", [1]),
        (_OPEN_MPI, f"10.0.0.2:{61440 + 453246976 // 4096 % 4096}", [1]),
        (_OPEN_MPI | _DAEMON, f"10.0.0.2:{61440 + 453246976 // 4096 % 4096}", [1]),
        (_OPEN_MPI | _BATCH_SCRIPT | {"JAX_COORDINATOR_PORT": "99"}, "10.0.0.2:99", [1]),
        (_JAX, "first:123", None),
        (_JAX | _POD, "first:123", None),
        (_JAX | _BATCH_SCRIPT, "first:123", None),
    ],
    ids=str,
)
def test_the_processes_of_each_scheduler(found, environment, address, devices):
    assert found(environment) == Cluster(address, 4, 3, devices)


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"SLURM_STEP_NUM_NODES": "4"}, None),  # One task on each node uses all its GPUs.
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),  # --gpus-per-task=1 shows each task one GPU.
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # JAX reads it.
    ],
    ids=str,
)
def test_the_gpus_of_a_task(found, environment, devices):
    assert found(_SLURM | environment).local_device_ids == devices


@pytest.mark.parametrize(
    "environment, message",
    [
        ({}, "no scheduler started this process: start it with srun or mpirun, or set JAX_COORD"),
        (_POD, "no scheduler started this process"),
        (_BATCH_SCRIPT, "not in a task of srun, .*: put srun before the command"),
        # The shell of salloc can be a step of its own.
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "put srun before"),
        (_SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4: expected less than SLURM_NTASKS=4"),
        (_SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1: expected a number"),
        (_SLURM | {"SLURM_JOB_ID": "7_1"}, "SLURM_JOB_ID=7_1: expected a number"),
        (
            _SLURM | {"SLURM_NTASKS": "x", "SLURM_STEP_NUM_TASKS": "x"},
            "SLURM_NTASKS=x: expected a number",
        ),
        (_JAX | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: expected less than JAX_NUM_PROCESSES"),
        (
            _SLURM | _JAX | {"JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 and SLURM_PROCID=3 contradict each other: unset",
        ),
        (
            _SLURM | _OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "8"},
            "OMPI_COMM_WORLD_SIZE=8 and SLURM_NTASKS=4 contradict each other: unset",
        ),
        (
            _SLURM | _OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"},
            "OMPI_COMM_WORLD_RANK=0 and SLURM_PROCID=3 contradict each other: unset",
        ),
        (
            {x: _OPEN_MPI[x] for x in _OPEN_MPI if x != "OMPI_MCA_orte_hnp_uri"},
            "OMPI_COMM_WORLD_SIZE is in the environment without JAX_COORDINATOR_ADDRESS",
        ),
        (
            {x: _SLURM[x] for x in _SLURM if x != "SLURM_STEP_NODELIST"},
            "SLURM_NTASKS is in the environment without JAX_COORDINATOR_ADDRESS",
        ),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is missing in the environment"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is missing in the environment"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES is in the environment without JAX_COORDINATOR_ADDRESS: expected",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "first:123"}, "no scheduler started this process"),
    ],
    ids=str,
)
def test_variables_that_no_run_can_start_with(found, environment, message, recwarn):
    with pytest.raises(ValueError, match=f"--distributed.*{message}"):
        found(environment)
    assert not recwarn.list  # Of JAX, about packages that it misses.
