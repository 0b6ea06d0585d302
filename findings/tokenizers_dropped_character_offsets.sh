#!/bin/sh
# Offsets of a BPE of tokenizers point at other characters behind one that it does not know.
#
# Expected: offsets tell which part of the text a token comes from. A character outside the vocabulary
#   of a BPE without an unknown token yields no token, and the offsets of the others stay right.
# What happens: the offsets are counted from the tokens that are kept. Behind a dropped character every
#   token of the same word points at text further left by its length in bytes. A label that is laid
#   on text by offsets moves with it. The next word is right again.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/models/bpe/model.rs, BPE::merge_word (adds nothing for such a character),
#   and tokenizers/src/models/bpe/word.rs, Word::get_offsets_iter (sums up lengths from 0).
#
# Output:
#   'abc': tokens ['ab', 'c'], text at their offsets ['ab', 'c']
#   'xabc': tokens ['ab', 'c'], text at their offsets ['xa', 'b']
#   'xxabc': tokens ['ab', 'c'], text at their offsets ['xx', 'a']
#   'aéc': tokens ['a', 'c'], text at their offsets ['a', 'é']
#   'xab cab': tokens ['ab', 'c', 'ab'], text at their offsets ['xa', 'c', 'ab']
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")]))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
for text in ("abc", "xabc", "xxabc", "aéc", "xab cab"):
    encoding = tokenizer.encode(text)
    parts = [text[start:stop] for start, stop in encoding.offsets]
    print(f"{text!r}: tokens {encoding.tokens}, text at their offsets {parts}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
