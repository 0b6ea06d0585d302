#!/bin/sh
# Tasks of srun get SIGTERM twice when their job is preempted.
#
# Expected: one SIGTERM, and SIGKILL after KillWait seconds, so that programs for which a second
#   SIGTERM means "now" (as a second Ctrl-C does) have that time to save their work.
# What happens: the daemon of each node sends SIGTERM to its tasks, and about five milliseconds later
#   they get another one from srun, which is itself told to end. This is so without a grace time.
# Version: SLURM 22.05.8 (Debian 12).
# Decided in: not traced in the source. The job's log has "srun: forcing job termination" at the
#   second one, so srun is where it comes from.
#
# Output:
#   SIGTERM reached 8 of 8 tasks, and some of them twice within a second
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
daemons=
trap 'kill $daemons; wait; rm -rf "$folder"' EXIT
cd "$folder"
if ! PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
  apt-get install --yes --quiet=2 slurm-wlm >/dev/null 2>&1
fi
# A controller and a node daemon of this machine, without munge, systemd and cgroups.
cat > slurm.conf <<CONFIGURATION
ClusterName=finding
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/none
CredType=cred/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
NodeName=localhost NodeAddr=127.0.0.1 Port=16818 CPUs=8
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONFIGURATION
export SLURM_CONF="$folder/slurm.conf" PATH="$PATH:/usr/sbin"
mkdir state spool
slurmctld -D -f slurm.conf -i >slurmctld.log 2>&1 &
daemons=$!
slurmd -D -f slurm.conf -N localhost >slurmd.log 2>&1 &
daemons="$daemons $!"
until sinfo --noheader --format=%t 2>/dev/null | grep -q idle; do sleep 0.2; done
cat > finding.py <<'PYTHON'
import os
import signal
import time

reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.set_wakeup_fd(writer)
task = os.environ["SLURM_PROCID"]
open(f"started{task}", "w").close()
os.read(reader, 1)
time.sleep(1)
os.set_blocking(reader, False)
try:
    again = os.read(reader, 1)
except BlockingIOError:
    again = b""
with open(f"task{task}", "w") as file:
    print("twice" if again else "once", file=file)
PYTHON
job=$(sbatch --parsable --ntasks=8 --no-requeue --output=job.log \
  --wrap="srun python3 finding.py")
until [ "$(find . -name 'started*' | wc -l)" = 8 ]; do sleep 0.1; done
sbatch --wait --partition=urgent --exclusive --output=urgent.log --wrap=true >/dev/null
while squeue --noheader --job "$job" | grep -q .; do sleep 0.5; done
twice=$(cat task* | grep -q twice && echo ", and some of them twice within a second")
echo "SIGTERM reached $(cat task* | wc -l) of 8 tasks$twice" | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
