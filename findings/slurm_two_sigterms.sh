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
    again = os.read(reader, 1)
except BlockingIOError:
    again = b""
with open(f"task{task}", "w") as file:
    print("twice" if again else "once", file=file)
PYTHON
job=$(sbatch --parsable --nodes=2 --ntasks=8 --no-requeue --output=job.log \
  --wrap="srun python3 finding.py")
until [ "$(find . -name 'started*' | wc -l)" = 8 ]; do sleep 0.1; done
sbatch --wait --partition=urgent --nodes=2 --exclusive --output=urgent.log --wrap=true >/dev/null
while squeue --noheader --job "$job" | grep -q .; do sleep 0.5; done
twice=$(cat task* | grep -q twice && echo ", and some of them twice within a second")
echo "SIGTERM reached $(cat task* | wc -l) of 8 tasks$twice" | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
