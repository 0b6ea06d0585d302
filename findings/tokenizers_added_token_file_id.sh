#!/bin/sh
# tokenizers reads the id of an added token in tokenizer.json and then does not use it.
#
# Expected: tokenizer.json states the ids. An added token of id 1000 is token 1000 when the file is
#   loaded, or the file is refused.
# What happens: the token gets the next free id, 3 here, and nothing is printed. Ids that were computed
#   with the ids of the file decode to nothing. The template of the post-processor keeps the id of the
#   file, so one tokenizer yields two ids for the same token, and saving writes both of them.
# Version: tokenizers 0.23.3.
# Decided in: tokenizers/src/tokenizer/serialization.rs, TokenizerVisitor::visit_map (adds the tokens
#   by their text; a mismatch is logged for tokens of the model alone, and Python shows no logs).
#
# Output:
#   id of <eos>: 1000 in the file, 3 loaded
#   encoded 'a': [1, 1000]
#   encoded '<eos>': [3, 1000]
#   decoded [1000]: ''
#   saved again: 3, in the template [1000]
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import json

from tokenizers import AddedToken, Tokenizer, models, processors

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
tokenizer.add_special_tokens([AddedToken("<eos>")])
tokenizer.post_processor = processors.TemplateProcessing(
    single="$A <eos>", special_tokens=[("<eos>", 1000)]
)
data = json.loads(tokenizer.to_str())
data["added_tokens"][0]["id"] = 1000

loaded = Tokenizer.from_str(json.dumps(data))
print(f"id of <eos>: {data['added_tokens'][0]['id']} in the file, {loaded.token_to_id('<eos>')} loaded")
print(f"encoded 'a': {loaded.encode('a').ids}")
print(f"encoded '<eos>': {loaded.encode('<eos>').ids}")
print(f"decoded [1000]: {loaded.decode([1000], skip_special_tokens=False)!r}")
saved = json.loads(loaded.to_str())
template = saved["post_processor"]["special_tokens"]["<eos>"]["ids"]
print(f"saved again: {saved['added_tokens'][0]['id']}, in the template {template}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
