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
cluster=$(dirname "$script")/../examples/clusters/slurm_cluster.py
folder=$(mktemp -d)
trap 'python3 "$cluster" down "$folder/cluster"; rm -rf "$folder"' EXIT
cd "$folder"
if ! PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
  apt-get install --yes --quiet=2 slurm-wlm munge >/dev/null 2>&1
fi
variables=$(python3 "$cluster" up "$folder/cluster")
eval "$variables"
cat > job.sh <<'JOB'
#!/bin/sh
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  srun sh -c 'trap "exit 0" TERM; touch started; while :; do sleep 0.1; done'
  [ "$1" = exits ] || scontrol requeue "$SLURM_JOB_ID"
fi
JOB
find_state() { # The words for the output, and how the job ends.
  rm -f started
  job=$(sbatch --parsable --nodes=2 --output=job.log job.sh "$2")
  until [ -e started ]; do sleep 0.1; done
  sbatch --wait --partition=urgent --nodes=2 --exclusive --output=urgent.log --wrap=true >/dev/null
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
