#!/bin/sh
# At SIGTERM, mpirun waits before it passes the signal on, and kills the processes soon after.
#
# Expected: mpirun passes SIGTERM on and waits, so that programs can save their work, as shells,
#   srun and Kubernetes have them do, which wait for half a minute.
# What happens: the processes get SIGTERM after one second, and SIGKILL after another one. The
#   parameter odls_base_sigkill_timeout changes both: a longer time to save is also a longer time
#   until the processes hear of it, and mpirun waits for all of it, even if they have ended.
# Version: Open MPI 4.1.4 (Debian 12).
# Decided in: orte/mca/odls/base/odls_base_default_fns.c of Open MPI,
#   orte_odls_base_default_kill_local_procs (sleeps for the time after each of its signals, SIGCONT,
#   SIGTERM and SIGKILL).
#
# Output:
#   by default: asked to stop
#   odls_base_sigkill_timeout=5: asked to stop, saved
#   mpirun waited for at least 9 s more
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
if ! command -v mpirun >/dev/null; then
  apt-get install --yes --quiet=2 openmpi-bin >/dev/null 2>&1
fi
cat > program.sh <<'PROGRAM'
#!/bin/sh
trap 'echo "asked to stop"; sleep 3; echo saved; exit 0' TERM
touch started
while :; do sleep 0.1; done
PROGRAM
chmod +x program.sh
stop() { # How the line begins; options of mpirun.
  name=$1
  shift
  rm -f started
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    mpirun -n 1 "$@" ./program.sh > lines.txt 2>/dev/null &
  until [ -e started ]; do sleep 0.1; done
  begin=$(date +%s)
  kill -TERM $!
  wait $! || true
  seconds=$(($(date +%s) - begin))
  echo "$name: $(paste --serial --delimiters=, lines.txt | sed 's/,/, /g')"
}
{
  stop "by default"
  stop "odls_base_sigkill_timeout=5" --mca odls_base_sigkill_timeout 5
  [ "$seconds" -lt 9 ] || echo "mpirun waited for at least 9 s more"
} | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
