#!/bin/sh
# Python's lzma reads only the first part of an .xz file that has padding between its streams.
#
# Expected: "Stream Padding" (zero bytes, a multiple of four) may follow each stream of an .xz file;
#   `xz -dc` reads on behind it. `lzma` reads files of several streams, so it does so too, or raises.
# What happens: `lzma.decompress`, `LZMAFile` and `lzma.open` stop at padding with another stream behind
#   it and return what they have, without an error: the rest of the data is missing. With padding at
#   the very end, which is as valid, they raise an error about data that ended too early.
# Version: seen alike with Python 3.11.7, 3.12.1 and 3.13.0.
# Decided in: lzma.py, decompress, and _compression.py, DecompressReader.read (an error behind the
#   first stream counts as trailing data, which is left out).
#
# Output:
#   two streams: decompress b'one two', open b'one two'
#   two streams, padding between: decompress b'one ', open b'one '
#   one stream, padding behind: decompress LZMAError, open EOFError
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > finding.py <<'PYTHON'
import lzma

first, second = lzma.compress(b"one "), lzma.compress(b"two")
files = {
    "two streams": first + second,
    "two streams, padding between": first + bytes(4) + second,
    "one stream, padding behind": first + bytes(4),
}
for name, data in files.items():
    with open("file.xz", "wb") as file:
        file.write(data)
    found = []
    for read in (lambda: lzma.decompress(data), lambda: lzma.open("file.xz").read()):
        try:
            found.append(repr(read()))
        except (lzma.LZMAError, EOFError) as error:
            found.append(type(error).__name__)
    print(f"{name}: decompress {found[0]}, open {found[1]}")
PYTHON
python3 finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
