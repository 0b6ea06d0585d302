#!/bin/sh
# tokenizers gives an added token the id of a token that is there already.
#
# Expected: a token that is added gets an id that no other token has, whatever the ids in the model.
# What happens: the new id is the size of the model's vocabulary. If the ids of the model are not the
#   numbers from 0 on without a gap (a model file whose special tokens stand elsewhere), that id may
#   be taken. Training after adding has the same end: the model's ids begin at 0 again, the added
#   tokens keep theirs. Two tokens then share an id, nothing is raised, and an ordinary word decodes
#   to the added token, or to nothing where that token is special.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/tokenizer/added_vocabulary.rs, AddedVocabulary::add_tokens (`next_id`);
#   tokenizers/src/tokenizer/mod.rs, TokenizerImpl::train (keeps the added tokens as they are).
#
# Output:
#   vocabulary with a gap: {'<eos>': 3, '<unk>': 0, 'b': 1, 'c': 3}
#     'c' -> [3] -> '<eos>'
#     '<eos>' -> [3] -> '<eos>'
#   trained after adding: {'<eos>': 0, 'b': 1, 'c': 0}
#     'c' -> [0] -> '<eos>'
#     '<eos>' -> [0] -> '<eos>'
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def show(name, tokenizer):
    print(f"{name}: {dict(sorted(tokenizer.get_vocab().items()))}")
    for text in ("c", "<eos>"):
        ids = tokenizer.encode(text).ids
        print(f"  {text!r} -> {ids} -> {tokenizer.decode(ids, skip_special_tokens=False)!r}")


tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "b": 1, "c": 3}, unk_token="<unk>"))
tokenizer.add_special_tokens(["<eos>"])
show("vocabulary with a gap", tokenizer)

tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.train_from_iterator(["c c b"], trainers.WordLevelTrainer(show_progress=False))
show("trained after adding", tokenizer)
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
