"""Finds a run's processes in the environment variables that a scheduler sets.

JAX reads these variables too, but believes the first scheduler that it finds, and reads neither
JAX_NUM_PROCESSES nor JAX_PROCESS_ID. Variables that contradict each other make processes wait for
others that never come.
"""

import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

# JAX's detection has no public interface that returns what it finds.
from jax._src.clusters import ClusterEnv, OmpiCluster, SlurmCluster

# The names of the number of processes and of the index of this one, by scheduler.
_JAX = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID")
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"  # Up to Open MPI 4.


class Cluster(NamedTuple):
    """The processes of a run.

    Attributes:
        coordinator_address: Address of process 0, host:port.
        num_processes: Number of processes.
        process_id: Index of this process.
        local_device_ids: The GPUs of this process among those that it sees; None for all of them.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None


def find_cluster(seconds: int) -> Cluster:
    """Finds the processes of the run that this process belongs to.

    Args:
        seconds: How long a cloud may take to name process 0.

    Raises:
        ValueError: If no scheduler's variables are found, or if they contradict each other.
        OSError: If a cloud cannot be asked.
    """
    found = [names for names in (_JAX, _OPEN_MPI) if _is_any_set(*names)]
    # Under mpirun, srun may have started a daemon of Open MPI on each node, whose tasks these are.
    if _is_srun_task() and not (_OPEN_MPI in found and _has_one_task_per_node()):
        found.append(_SLURM)
    if not found:
        return _detected_by_jax(seconds)
    first, *others = found
    rank = _rank(*first)
    for other in others:
        for name, value, other_name, other_value in zip(
            first, rank, other, _rank(*other), strict=True
        ):
            if value != other_value:
                raise ValueError(
                    f"--distributed: {name}={value} and {other_name}={other_value} contradict each"
                    " other: unset the variables of the scheduler that did not start this process"
                )
    return Cluster(_address(found), *rank, _local_device_ids(found))


def _is_any_set(*names: str) -> bool:
    return any(name in os.environ for name in names)


def _is_srun_task() -> bool:
    """Returns whether this is a task of `srun`, and not a batch script or the shell of `salloc`.

    These see the number of tasks of the whole job, although they may be the only task of a step.
    """
    count = os.environ.get("SLURM_STEP_NUM_TASKS")
    return count is not None and count == os.environ.get("SLURM_NTASKS")


def _has_one_task_per_node() -> bool:
    return os.environ.get("SLURM_STEP_NUM_NODES") == os.environ.get("SLURM_STEP_NUM_TASKS")


def _number(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"--distributed: {name} is missing in the environment")
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"--distributed: {name}={text}: expected a number")
    return int(text)


def _rank(size_name: str, index_name: str) -> tuple[int, int]:
    """Returns the number of processes and the index of this one, as a scheduler says."""
    size, index = _number(size_name), _number(index_name)
    if index >= size:
        raise ValueError(
            f"--distributed: {index_name}={index}: expected less than {size_name}={size}"
        )
    return size, index


def _address(found: Sequence[tuple[str, str]]) -> str:
    """Returns the address of process 0."""
    if address := os.environ.get(_ADDRESS):
        return address
    port = os.environ.get("JAX_COORDINATOR_PORT")
    if _OPEN_MPI in found and _OPEN_MPI_ADDRESS in os.environ:
        return OmpiCluster.get_coordinator_address(None, port)
    if _SLURM in found and "SLURM_STEP_NODELIST" in os.environ:
        _number("SLURM_JOB_ID")  # JAX makes a port of it.
        return SlurmCluster.get_coordinator_address(None, port)
    raise ValueError(
        f"--distributed: {found[0][0]} is in the environment without {_ADDRESS}: expected"
        " host:port of process 0"
    )


def _detected_by_jax(seconds: int) -> Cluster:
    """Returns the processes on Cloud TPUs, and where JAX may ask Kubernetes for them."""
    if _is_any_set("SLURM_JOB_ID", *_SLURM):
        raise ValueError(
            "--distributed in a SLURM job, but not in a task of srun, so this process would wait"
            " for others that never come: put srun before the command"
        )
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # In pods: the package kubernetes is missing.
            address, size, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, seconds
            )
    except RuntimeError as error:
        raise OSError(f"the cluster does not name its processes: {error}") from error
    if address is None or size is None or index is None:
        raise ValueError(
            "--distributed, but no scheduler started this process: start it with srun or mpirun, or"
            f" set {_ADDRESS}, {_JAX[0]} and {_JAX[1]} in its environment"
        )
    return Cluster(address, size, index, None)


def _local_device_ids(found: Sequence[tuple[str, str]]) -> list[int] | None:
    """Returns the GPU of this process, if the processes of a machine share the GPUs that they see.

    JAX gives a task of SLURM or Open MPI the GPU of its index, even if the task is alone on its
    machine, or if its scheduler shows it its own GPU only.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or (visible and "," not in visible):
        return None
    if _OPEN_MPI in found:
        is_alone = _number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1
        return None if is_alone else [_number("OMPI_COMM_WORLD_LOCAL_RANK")]
    if _SLURM in found:
        return None if _has_one_task_per_node() else [_number("SLURM_LOCALID")]
    return None
