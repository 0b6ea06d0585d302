#!/bin/sh
# SLURM does not requeue a preempted job that ends by itself within its grace time.
#
# Expected: with PreemptMode=REQUEUE a preempted job goes back into the queue, also if its program
#   uses the grace time as meant: it saves its work at SIGTERM and exits.
# What happens: SLURM takes the job for done (COMPLETED), and never starts it again. Only a job that
#   is still there when the grace time is over is requeued. A job has to requeue itself.
# Version: SLURM 22.05.8 (Debian 12).
# Decided in: slurmctld/preempt.c of SLURM, slurm_job_check_grace (sends SIGTERM and shortens the
#   job's time limit; the job is requeued only when that is over).
#
# Output:
#   exits at SIGTERM: COMPLETED, 0 restarts
#   requeues itself: COMPLETED, 1 restarts
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
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONFIGURATION
export SLURM_CONF="$folder/slurm.conf" PATH="$PATH:/usr/sbin"
mkdir state spool
slurmctld -D -f slurm.conf -i >slurmctld.log 2>&1 &
daemons=$!
slurmd -D -f slurm.conf -N localhost >slurmd.log 2>&1 &
daemons="$daemons $!"
until sinfo --noheader --format=%t 2>/dev/null | grep -q idle; do sleep 0.2; done
cat > job.sh <<'JOB'
#!/bin/sh
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  srun sh -c 'trap "exit 0" TERM; touch started; while :; do sleep 0.1; done'
  [ "$1" = exits ] || scontrol requeue "$SLURM_JOB_ID"
fi
JOB
find_state() { # The words for the output, and how the job ends.
  rm -f started
  job=$(sbatch --parsable --output=job.log job.sh "$2")
  until [ -e started ]; do sleep 0.1; done
  sbatch --wait --partition=urgent --exclusive --output=urgent.log --wrap=true >/dev/null
  while squeue --noheader --job "$job" | grep -q .; do sleep 0.5; done
  scontrol --oneliner show job "$job" |
    sed "s/.* JobState=\([A-Z]*\) .* Restarts=\([0-9]*\) .*/$1: \1, \2 restarts/"
}
{
  find_state "exits at SIGTERM" exits
  find_state "requeues itself" requeues
} | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
