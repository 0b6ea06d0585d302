#!/bin/sh
# tokenizers does not truncate at all if the limit is less than the number of special tokens.
#
# Expected: `enable_truncation` with a limit below the number of special tokens that are put around
#   each text raises, as a stride that does not fit does; or only special tokens remain.
# What happens: the number of special tokens is taken from the limit in unsigned arithmetic, and the
#   limit turns into a huge number. A limit of 2 leaves 2 tokens; limits of 1 and 0 leave all of them.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/tokenizer/mod.rs, TokenizerImpl::with_truncation (tests the stride with
#   the same difference) and TokenizerImpl::post_process (`trunc.max_length - n_added_tokens`).
#
# Output:
#   limit 4: ['[C]', 'a', 'b', '[S]']
#   limit 3: ['[C]', 'a', '[S]']
#   limit 2: ['[C]', '[S]']
#   limit 1: ['[C]', 'a', 'b', 'a', 'b', 'a', 'b', 'a', 'b', '[S]']
#   limit 0: ['[C]', 'a', 'b', 'a', 'b', 'a', 'b', 'a', 'b', '[S]']
#   limit 4, stride 3: tokenizer stride set to 3,...
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

vocabulary = {"a": 0, "b": 1, "[C]": 2, "[S]": 3}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[C] $A [S]", special_tokens=[("[C]", 2), ("[S]", 3)]
)
for limit in (4, 3, 2, 1, 0):
    tokenizer.enable_truncation(limit)
    print(f"limit {limit}: {tokenizer.encode('a b a b a b a b').tokens}")
try:
    tokenizer.enable_truncation(4, stride=3)
except Exception as error:
    print(f"limit 4, stride 3: {str(error)[:26]}...")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
