#!/bin/sh
# transformers 5 leaves out the normalizer of a tokenizer.json.
#
# Expected: AutoTokenizer encodes as `tokenizers` does with the tokenizer.json in the same folder, and
#   as version 4 did. A comment in the source says so too ("matches the tokenizer.json").
# What happens: where tokenizer_config.json names a class such as GPT2Tokenizer, the vocabulary, the
#   merges and the post-processor are taken from the file. Normalizer, pre-tokenizer and decoder are
#   those that the class has built in, if any. A file that lowers all letters, and so has no capitals
#   in its vocabulary, is read without its normalizer: capitals are dropped without a word.
# Version: transformers 5.24.0, beside 4.57.6.
# Decided in: transformers/tokenization_utils_tokenizers.py,
#   TokenizersBackend.convert_to_native_format; transformers/models/gpt2/tokenization_gpt2.py,
#   GPT2Tokenizer.__init__ (builds a tokenizer anew).
#
# Output:
#   tokenizers: [0, 1, 2, 1]
#   transformers 4.57.6: [0, 1, 2, 1], decoded 'ab b'
#   transformers 5.24.0: [1, 2], decoded 'b '
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 4.57.6 5.24.0; do
  python3 -m venv "venv-$version"
  "venv-$version/bin/pip" install --quiet "transformers==$version" >/dev/null 2>&1
done
cat > save.py <<'PYTHON'
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "<eos>": 3}, []))
tokenizer.normalizer = normalizers.Lowercase()
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.save("tokenizer.json")
config = {"tokenizer_class": "GPT2Tokenizer"}
config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<eos>")
with open("tokenizer_config.json", "w") as file:
    json.dump(config, file)
print(f"tokenizers: {tokenizer.encode('Ab B').ids}")
PYTHON
cat > load.py <<'PYTHON'
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(".")
ids = tokenizer("Ab B")["input_ids"]
print(f"transformers {transformers.__version__}: {ids}, decoded {tokenizer.decode(ids)!r}")
PYTHON
{
  venv-5.24.0/bin/python save.py
  venv-4.57.6/bin/python load.py 2>/dev/null
  venv-5.24.0/bin/python load.py 2>/dev/null
} | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
