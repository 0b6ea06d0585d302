#!/bin/sh
# In tokenizers an added token that does not count at a place hides another one there that would.
#
# Expected: "new" and "new york" are added as whole words. In "new yorker" the second is no whole word,
#   so it does not match; "new" is one, and matches as it does before any other word. Likewise for
#   special tokens that are to be encoded as plain text: the other added tokens in them are found.
# What happens: the longest token is searched for first and tested afterwards. If it is turned down,
#   the search goes on behind it. A shorter token inside of it is not found.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/tokenizer/added_vocabulary.rs, AddedVocabulary::find_matches (`continue`
#   in the loop over leftmost longest matches).
#
# Output:
#   'new york': ['new york']
#   'new deal': ['new', '<unk>']
#   'new yorker': ['<unk>']
#   '<b>!', special tokens as text False: ['<b>!']
#   '<b>?', special tokens as text False: ['<b>', '<unk>']
#   '<b>!', special tokens as text True: ['<unk>']
#   '<b>?', special tokens as text True: ['<b>', '<unk>']
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import AddedToken, Tokenizer, models

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer.add_tokens([AddedToken(text, single_word=True) for text in ("new", "new york")])
for text in ("new york", "new deal", "new yorker"):
    print(f"{text!r}: {tokenizer.encode(text).tokens}")

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
tokenizer.add_special_tokens(["<b>!"])
for plain in (False, True):
    tokenizer.encode_special_tokens = plain
    for text in ("<b>!", "<b>?"):
        print(f"{text!r}, special tokens as text {plain}: {tokenizer.encode(text).tokens}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
