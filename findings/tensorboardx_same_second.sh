#!/bin/sh
# A second SummaryWriter of tensorboardX in one folder and second wipes out what the first wrote.
#
# Expected: each writer adds a file of events to its folder, as TensorBoard's own writers do, and
#   TensorBoard shows all of them. Nothing that was written and closed is removed.
# What happens: the file is named after the second and the host and opened for writing from its start. A
#   program that restarts within a second, or two writers that are made one after another, use the
#   same name, and only the events of the last one are left.
# Version: tensorboardX 2.6.5.
# Decided in: tensorboardX/event_file_writer.py, EventsWriter.__init__ (the name);
#   tensorboardX/record_writer.py, open_file (mode "wb").
#
# Output:
#   pause of 1 s: 2 files, steps [1, 2]
#   pause of 0 s: 1 files, steps [2]
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tensorboardX==2.6.5 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import os
import time

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event


def steps(folder):
    found = []
    for name in os.listdir(folder):
        with open(f"{folder}/{name}", "rb") as file:
            while size := file.read(12):
                event = Event.FromString(file.read(int.from_bytes(size[:8], "little")))
                found += [event.step for value in event.summary.value]
                file.read(4)
    return sorted(found)


def write(folder, step):
    with SummaryWriter(folder) as writer:
        writer.add_scalar("loss", 1.0, step)


for pause in (1, 0):
    folder = f"pause of {pause} s"
    time.sleep(1 - time.time() % 1)
    write(folder, 1)
    time.sleep(pause)
    write(folder, 2)
    print(f"{folder}: {len(os.listdir(folder))} files, steps {steps(folder)}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
