#!/bin/sh
# A backslash in a path becomes a slash in TensorStore's file driver, on Linux too.
#
# Expected: on Linux a backslash is a character of a name like any other. The path that Python, the
#   shell and TensorStore are given is the same folder.
# What happens: a store whose path is `a\b/` writes to folder b in folder a. What lies in a folder that
#   is called `c\d` is not found if the path names it, and found under its name in the folder above:
#   keys keep their backslashes.
# Version: tensorstore 0.1.86, on Linux.
# Decided in: the path of driver "file" when a store is opened; keys (`KvStore.list`) are left alone.
#
# Output:
#   folders: ['a', 'c\\d'], in a: ['b']
#   keys in c\d: []
#   key in the folder above: a/b/key, value
#   key in the folder above: c\d/key, value
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tensorstore==0.1.86 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import os

from tensorstore import KvStore


def open_store(path):
    return KvStore.open({"driver": "file", "path": f"{os.getcwd()}/stores/{path}"}).result()


os.makedirs("stores/c\\d")
with open("stores/c\\d/key", "w") as file:
    file.write("value")
open_store("a\\b/").write("key", b"value").result()
print(f"folders: {sorted(os.listdir('stores'))}, in a: {os.listdir('stores/a')}")
print(f"keys in c\\d: {open_store('c' + chr(92) + 'd/').list().result()}")
for key in sorted(open_store("").list().result()):
    print(f"key in the folder above: {key.decode()}, {open_store('').read(key).result().state}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
