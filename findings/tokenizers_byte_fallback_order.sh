#!/bin/sh
# A BPE of tokenizers with byte fallback can return the tokens of a text in the wrong order.
#
# Expected: the tokens of a text come in the order of the text, and their offsets rise. This holds for
#   a vocabulary with a few byte tokens too, such as one for the line feed only.
# What happens: an unknown token is held back so that it can be fused with the next one. A character
#   that falls back to bytes does not let it out first: the bytes come before the unknown token, and
#   the unknown token then comes last or in front of the next character that is in the vocabulary. A
#   line feed moves to the front, and of two unknown characters around it only one token may remain.
#   The offsets are wrong as well.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/models/bpe/model.rs, BPE::merge_word (the `continue` of the byte fallback
#   passes over the unknown token that is held back).
#
# Output:
#   'a\nb': ['a', '<0x0A>', 'b'] [(0, 1), (1, 2), (2, 3)]
#   'aéb': ['a', '<unk>', 'b'] [(0, 1), (1, 2), (2, 3)]
#   'aé\nb': ['a', '<0x0A>', '<unk>', 'b'] [(0, 1), (1, 2), (1, 3), (3, 4)]
#   'é\n': ['<0x0A>', '<unk>'] [(0, 1), (0, 2)]
#   'é\néb' fused: ['<0x0A>', '<unk>', 'b'] [(0, 1), (0, 3), (3, 4)]
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, models

vocabulary = {"<unk>": 0, "a": 1, "b": 2, "<0x0A>": 3}


def show(text, **options):
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, **options)
    encoding = Tokenizer(model).encode(text)
    print(f"{text!r}{' fused' if options else ''}: {encoding.tokens} {encoding.offsets}")


show("a\nb")
show("aéb")
show("aé\nb")
show("é\n")
show("é\néb", fuse_unk=True)
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
