#!/bin/sh
# In tokenizers `special_tokens_mask` does not mark the special tokens of a text.
#
# Expected: the docstring says that the mask "indicates which tokens are special tokens, and which are
#   not". It is 1 wherever the id is that of a special token.
# What happens: it is 1 for what the post-processor and padding add, and 0 for the same token where the
#   text spells it. A chat or packed text that holds its own <eos> has an <eos> with 0 and one with 1,
#   although both were taken as special tokens and `decode` leaves both out.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/tokenizer/encoding.rs, the FromIterator of Encoding (zeros for all tokens),
#   and tokenizers/src/processors/template.rs, TemplateProcessing::apply_template (ones for its own).
#
# Output:
#   'a b': ['a', 'b', '<eos>'], mask [0, 0, 1]
#     decoded: 'a b'
#   'a <eos> b': ['a', '<eos>', 'b', '<eos>'], mask [0, 0, 0, 1]
#     decoded: 'a b'
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.post_processor = processors.TemplateProcessing(
    single="$A <eos>", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
)
for text in ("a b", "a <eos> b"):
    encoding = tokenizer.encode(text)
    print(f"{text!r}: {encoding.tokens}, mask {encoding.special_tokens_mask}")
    print(f"  decoded: {tokenizer.decode(encoding.ids)!r}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
