#!/bin/sh
# A tokenizer that transformers 5 has saved again cannot be loaded by transformers 4.
#
# Expected: tokenizer.json and tokenizer_config.json are a stable format. Loading a tokenizer and
#   saving it changes nothing that the last release of version 4, still in wide use, could not read.
# What happens: version 5 replaces the name of the class, `PreTrainedTokenizerFast`, by one that
#   only it knows, and writes the extra special tokens as a list where version 4 expects a dict.
#   AutoTokenizer of version 4 raises; tokenizer.json itself is still read by both.
# Version: saved by transformers 5.24.0, loaded by 4.57.6.
# Decided in: transformers/tokenization_utils_base.py, PreTrainedTokenizerBase.save_pretrained
#   (version 5); transformers/models/auto/tokenization_auto.py, AutoTokenizer (version 4).
#
# Output:
#   before: PreTrainedTokenizerFast
#   4.57.6 loads it: [1, 2]
#   saved again by 5.24.0: TokenizersBackend
#   4.57.6: ValueError: Tokenizer class TokenizersBackend does not exist or is not currently imported.
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 4.57.6 5.24.0; do
  python3 -m venv "venv-$version"
  "venv-$version/bin/pip" install --quiet "transformers==$version" >/dev/null 2>&1
done
mkdir mine again
cat > tokenizer.py <<'PYTHON'
import json

from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.save("mine/tokenizer.json")
config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
with open("mine/tokenizer_config.json", "w") as file:
    json.dump(config, file)
PYTHON
cat > load.py <<'PYTHON'
import sys

from transformers import AutoTokenizer

try:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    print(f" loads it: {tokenizer('a b')['input_ids']}")
except ValueError as error:
    print(f": ValueError: {error}")
PYTHON
class() { sed -n 's/.*"tokenizer_class": "\([A-Za-z]*\)".*/\1/p' "$1/tokenizer_config.json"; }
venv-5.24.0/bin/python tokenizer.py
{
  echo "before: $(class mine)"
  echo "4.57.6$(venv-4.57.6/bin/python load.py mine 2>/dev/null)"
  venv-5.24.0/bin/python -c "from transformers import AutoTokenizer
AutoTokenizer.from_pretrained('mine').save_pretrained('again')" >/dev/null 2>&1
  echo "saved again by 5.24.0: $(class again)"
  echo "4.57.6$(venv-4.57.6/bin/python load.py again 2>/dev/null)"
} | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
