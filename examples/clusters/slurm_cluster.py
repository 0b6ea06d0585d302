"""A SLURM cluster on this machine: a controller and several node daemons, without root or systemd.

    python3 slurm_cluster.py up FOLDER      # prints what to export
    python3 slurm_cluster.py down FOLDER

It needs Debian's `slurm-wlm` and `munge`. Everything it writes is in the folder. Two partitions
hold all nodes; a job in `urgent` preempts and requeues those in `normal`, which get SIGTERM and a
grace time first.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Debian installs the daemons here, which is not on the PATH of a user.
_DAEMONS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# Loopback addresses as names of nodes: every Linux resolves them, and JAX takes its coordinator's
# address from the list of names.
_NODES = "127.0.0.[{first}-{last}]"
_FIRST_NODE = 2
_CPUS_PER_NODE = 4  # Whatever the machine has.
_LONGEST_FOLDER = 60  # SLURM's sockets in it have names of up to 47 bytes, and 107 is the limit.
_SECONDS_TO_START = 60
_SECONDS_TO_STOP = 20

_CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The default makes a requeued job wait for two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# Neither cgroups nor bound CPUs, which a container may lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=200000,bf_interval=5
KillWait=10
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_seconds}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Returns the programs of SLURM and munge that this machine lacks."""
    return [name for name in _PROGRAMS if not shutil.which(name, path=_DAEMONS)]


@contextlib.contextmanager
def slurm_cluster(
    folder: Path, num_nodes: int = 2, grace_seconds: int = 120
) -> Iterator[dict[str, str]]:
    """Brings a cluster up, and down after the block.

    Args:
        folder: An existing folder for everything that it writes.
        num_nodes: The number of node daemons.
        grace_seconds: Seconds between the SIGTERM and the SIGKILL for a preempted job.

    Yields:
        The environment variables for `sbatch`, `srun` and the other commands.

    Raises:
        OSError: If a daemon does not start.
    """
    try:
        yield up(folder, num_nodes, grace_seconds)
    finally:
        down(folder)


def up(folder: Path, num_nodes: int = 2, grace_seconds: int = 120) -> dict[str, str]:
    """Starts the daemons; returns the environment variables for the commands.

    Args:
        folder: An existing folder for everything that it writes.
        num_nodes: The number of node daemons.
        grace_seconds: Seconds between the SIGTERM and the SIGKILL for a preempted job.

    Raises:
        OSError: If a daemon does not start, or if the path of the folder is too long.
    """
    if missing := missing_programs():
        raise OSError(f"{', '.join(missing)} not found: install slurm-wlm and munge")
    folder = folder.resolve()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise OSError(f"{folder}: expected a path of at most {_LONGEST_FOLDER} bytes, for sockets")
    names = [f"127.0.0.{_FIRST_NODE + i}" for i in range(num_nodes)]
    port, *node_ports = _free_ports(1 + num_nodes)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            folder=folder,
            port=port,
            user=getpass.getuser(),
            grace_seconds=grace_seconds,
            nodes="\n".join(
                f"NodeName={name} NodeAddr={name} NodeHostname={socket.gethostname()}"
                f" Port={node_port} CPUs={_CPUS_PER_NODE}"
                for name, node_port in zip(names, node_ports, strict=True)
            ),
        )
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    _start_munge(folder)
    _start(folder, "slurmctld", "slurmctld", "-D", env=environment)
    for name in names:
        _start(folder, f"slurmd-{name}", "slurmd", "-D", "-N", name, env=environment)
    _wait_for_nodes(num_nodes, environment)
    return environment


def down(folder: Path) -> None:
    """Stops the daemons of a cluster, and with them its jobs.

    Args:
        folder: The folder of the cluster.
    """
    environment = os.environ | {"SLURM_CONF": str(folder.resolve() / "slurm.conf")}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            ["scancel", "--user", getpass.getuser()], env=environment, timeout=_SECONDS_TO_STOP
        )
        _wait(lambda: not _output(["squeue", "--noheader"], environment), _SECONDS_TO_STOP)
    for process_file in sorted(folder.glob("*.process"), reverse=True):
        _stop(int(process_file.read_text()))
        process_file.unlink()


def _start_munge(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    socket_path = folder / "munge.socket"
    # --force: the folders above may be writable by others, as /tmp is.
    words = ["munged", "--foreground", "--force", "--num-threads=2", f"--socket={socket_path}"]
    words += [f"--key-file={key}", f"--pid-file={folder}/munge.pid"]
    words += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    _start(folder, "munged", *words)
    if not _wait(socket_path.exists, _SECONDS_TO_START):
        raise OSError(f"munged does not start: see {folder}/munged.out")


def _start(folder: Path, name: str, *words: str, env: dict[str, str] | None = None) -> None:
    """Starts a daemon, which outlives this process."""
    with open(folder / f"{name}.out", "wb") as out:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": _DAEMONS} | (env or {}),
            start_new_session=True,
        )
    (folder / f"{name}.process").write_text(str(process.pid))


def _wait_for_nodes(num_nodes: int, environment: dict[str, str]) -> None:
    def are_idle() -> bool:
        states = _output(["sinfo", "--noheader", "--Node", "--partition=normal", "-o", "%T"], env)
        return states.split() == ["idle"] * num_nodes

    env = os.environ | environment
    if not _wait(are_idle, _SECONDS_TO_START):
        folder = os.path.dirname(environment["SLURM_CONF"])
        raise OSError(f"the nodes do not come up: see the logs in {folder}")


def _output(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=_SECONDS_TO_STOP
    ).stdout


def _wait(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _stop(process: int) -> None:
    def has_ended() -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, os.WNOHANG)
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        return False

    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        if _wait(has_ended, _SECONDS_TO_STOP):
            return


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("", 0))
        return [server.getsockname()[1] for server in servers]


def main(argv: list[str]) -> int:
    """Brings a cluster up or down, and returns the exit status."""
    if len(argv) != 2 or argv[0] not in ("up", "down"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    folder = Path(argv[1])
    try:
        if argv[0] == "down":
            down(folder)
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        print(*(f"export {name}={value}" for name, value in up(folder).items()), sep="\n")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
