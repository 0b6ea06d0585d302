#!/bin/sh
# JAX's compilation cache stays empty for all processes but the first, even in folders of their own.
#
# Expected: a process that is given a folder of its own as `jax_compilation_cache_dir`, such as one on
#   the disk of its machine, finds there at its second start what it compiled at its first.
# What happens: only process 0 writes, as many writers are slow on some shared storage. Which folder
#   a process has makes no difference: the others read theirs, find nothing, and compile anew at each
#   start. Only a debug message says so.
# Version: jax 0.10.2, on the CPU.
# Decided in: jax/_src/compiler.py, _cache_write (returns if the process is not number 0).
#
# Output:
#   first start, process 0: 0 found, 1 there afterwards
#   first start, process 1: 0 found, 0 there afterwards
#   second start, process 0: 1 found, 1 there afterwards
#   second start, process 1: 0 found, 0 there afterwards
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import os
import socket
import subprocess
import sys


def start():
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, port, str(i)], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    return [process.communicate()[0].splitlines()[-1] for process in processes]


def work(port, i):
    import jax

    os.makedirs(f"cache_{i}", exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", f"cache_{i}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(i))
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.jit(lambda x: x * 2)(1.0).block_until_ready()
    found = events.count("/jax/compilation_cache/cache_hits")
    print(f"process {i}: {found} found, {len(os.listdir(f'cache_{i}'))} there afterwards")


if len(sys.argv) > 1:
    work(*sys.argv[1:])
else:
    for name in ("first", "second"):
        for line in start():
            print(f"{name} start, {line}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
