#!/bin/sh
# A text that spells "<0x41>" is encoded by a Unigram of tokenizers as the token of that byte.
#
# Expected: with one vocabulary, tokenizers and SentencePiece read a text alike. Byte tokens stand for
#   bytes that have no other token; SentencePiece does not find them in a text, so a text that spells
#   one comes back as it was.
# What happens: the Unigram model knows tokens and scores, but no kinds of token. All of them are found
#   in text: "<0x41>" becomes one token and is decoded to "A". A document about such tokens, or a hex
#   dump in this form, does not come back.
# Version: tokenizers 0.23.3 beside sentencepiece 0.2.3.
# Decided in: tokenizers/src/models/unigram/model.rs, Unigram::from (all tokens go into the trie).
#
# Output:
#   'x':
#     sentencepiece ['x'] -> 'x'
#     tokenizers ['x'] -> 'x'
#   '<0x41>':
#     sentencepiece ['<0x3C>', '<0x30>', 'x', '<0x34>', '<0x31>', '<0x3E>'] -> '<0x41>'
#     tokenizers ['<0x41>'] -> 'A'
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 sentencepiece==0.2.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import io

import sentencepiece
from tokenizers import Tokenizer, decoders, models

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["use <0x41> or <s> in x"] * 9),
    model_writer=model,
    vocab_size=300,
    hard_vocab_limit=False,
    byte_fallback=True,
    add_dummy_prefix=False,
    minloglevel=3,
)
reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
pieces = [(reference.id_to_piece(i), reference.get_score(i)) for i in range(len(reference))]
tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
for text in ("x", "<0x41>"):
    ids, other = reference.encode(text), tokenizer.encode(text).ids
    print(f"{text!r}:")
    print(f"  sentencepiece {[reference.id_to_piece(i) for i in ids]} -> {reference.decode(ids)!r}")
    print(f"  tokenizers {[pieces[i][0] for i in other]} -> {tokenizer.decode(other)!r}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
