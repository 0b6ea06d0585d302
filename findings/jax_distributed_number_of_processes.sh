#!/bin/sh
# Processes of JAX that were told different numbers of processes start without an error.
#
# Expected: `jax.distributed.initialize` with num_processes=2 in process 0 and 3 in process 1 raises in
#   one of them, or waits for a third until its time is up.
# What happens: only the number that process 0 was told is used. The others do not send theirs, so
#   process 1 has a process_count of 2, and its argument, from which a script may have computed
#   its share of the data or of the batch, is wrong without a word.
# Version: jax 0.10.2, on the CPU.
# Decided in: jax/_src/distributed.py, State.initialize (the client connects without the number);
#   xla/pjrt/distributed/topology_util.cc of XLA, ExchangeTopologies (process 0 alone counts).
#
# Output:
#   process 0 is told 2: process_count 2, devices 2
#   process 1 is told 3: process_count 2, devices 2
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import socket
import subprocess
import sys

if len(sys.argv) == 1:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(port), str(i), str(told)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, told in enumerate((2, 3))
    ]
    for process in processes:
        print(process.communicate()[0].splitlines()[-1])
else:
    import jax

    port, i, told = map(int, sys.argv[1:])
    jax.distributed.initialize(f"localhost:{port}", num_processes=told, process_id=i)
    count, devices = jax.process_count(), jax.device_count()
    print(f"process {i} is told {told}: process_count {count}, devices {devices}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
