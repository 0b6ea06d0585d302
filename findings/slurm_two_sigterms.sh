#!/bin/sh
# A task of srun gets SIGTERM twice when its job is preempted.
#
# Expected: one SIGTERM, and SIGKILL after KillWait seconds, so that programs for which a second
#   SIGTERM means "now" (as a second Ctrl-C does) have that time to save their work.
# What happens: the daemon of each node sends SIGTERM to its tasks, and srun, which the controller
#   asks to end too, sends another one about five milliseconds later. It is so without a grace time,
#   and may be so at scancel.
# Version: SLURM 22.05.8 (Debian 12).
# Decided in: slurmd/slurmd/req.c of SLURM, _rpc_terminate_job (SIGCONT and SIGTERM to the steps of
#   the job), and libsrun/launch.c and api/step_launch.c, slurm_step_launch_abort (srun's signal).
#
# Output:
#   task 0: SIGTERM, and SIGTERM again within a second
#   task 1: SIGTERM, and SIGTERM again within a second
set -eu
script=$(realpath "$0")
cluster=$(dirname "$script")/../examples/clusters/slurm_cluster.py
folder=$(mktemp -d)
trap 'python3 "$cluster" down "$folder/cluster"; rm -rf "$folder"' EXIT
cd "$folder"
if ! PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
  apt-get install --yes --quiet=2 slurm-wlm munge >/dev/null 2>&1
fi
variables=$(python3 "$cluster" up "$folder/cluster")
eval "$variables"
scontrol update PartitionName=normal GraceTime=0
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
    again = ", and SIGTERM again within a second" if os.read(reader, 1) else ""
except BlockingIOError:
    again = ""
with open(f"task{task}", "w") as file:
    print(f"task {task}: SIGTERM{again}", file=file)
PYTHON
job=$(sbatch --parsable --nodes=2 --no-requeue --output=job.log --wrap="srun python3 finding.py")
until [ -e started0 ] && [ -e started1 ]; do sleep 0.1; done
sbatch --wait --partition=urgent --nodes=2 --exclusive --output=urgent.log --wrap=true >/dev/null
while squeue --noheader --job "$job" | grep -q .; do sleep 0.5; done
cat task0 task1 | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
