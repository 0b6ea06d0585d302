#!/bin/sh
# The Metaspace decoder of tokenizers removes every space of the first token, not the one it added.
#
# Expected: Metaspace puts one "▁" before a text, and decoding removes one. SentencePiece does so. A
#   text that begins with spaces loses one of them at most.
# What happens: all "▁" of the first token are removed. With a vocabulary that has tokens for runs of
#   spaces, as those for code have, the indent of a text goes as a whole, and how much is lost depends
#   on how it was cut into tokens.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/pre_tokenizers/metaspace.rs, Metaspace::decode_chain (leaves out each
#   replacement character where `i == 0`).
#
# Output:
#   'x': ['▁x'] -> 'x'
#   '  x': ['▁', '▁x'] -> ' x'
#   '   x': ['▁', '▁', '▁x'] -> '  x'
#   '    x': ['▁▁▁▁', 'x'] -> 'x'
#   'x    x': ['▁x', '▁▁▁▁', 'x'] -> 'x    x'
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁x", -2.0), ("▁▁▁▁", -1.0), ("x", -3.0)]
tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
tokenizer.decoder = decoders.Metaspace(split=False)
for text in ("x", "  x", "   x", "    x", "x    x"):
    encoding = tokenizer.encode(text)
    print(f"{text!r}: {encoding.tokens} -> {tokenizer.decode(encoding.ids)!r}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
