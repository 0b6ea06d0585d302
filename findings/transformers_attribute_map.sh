#!/bin/sh
# A config.json can rename the attributes of its own configuration in transformers.
#
# Expected: `attribute_map` belongs to a configuration's class, as documented. A field of that name
#   in config.json is data, like any other field that the class does not know, and changes no other.
# What happens: it is set on the object, where every later access to an attribute is looked up in it.
#   The configuration then answers with another field, and even with a number in place of a property
#   that is computed (`xLSTMConfig.qk_head_dim`, which no field can set). It stays when saved again.
# Version: transformers 5.24.0.
# Decided in: transformers/configuration_utils.py, PreTrainedConfig.__post_init__ (sets unknown
#   fields) and PreTrainedConfig.__getattribute__ (looks names up).
#
# Output:
#   hidden_size of a Llama: 64, with attribute_map: 1024
#   qk_head_dim of an xLSTM: 16, with attribute_map: 12
#   saved and loaded again: 12
#   qk_head_dim as a field: AttributeError
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import json

from transformers import AutoConfig


def load(**fields):
    with open("config.json", "w") as file:
        json.dump(fields, file)
    return AutoConfig.from_pretrained(".")


llama = {"model_type": "llama", "hidden_size": 64, "vocab_size": 1024}
renamed = llama | {"attribute_map": {"hidden_size": "vocab_size"}}
print(
    f"hidden_size of a Llama: {load(**llama).hidden_size},"
    f" with attribute_map: {load(**renamed).hidden_size}"
)
xlstm = {"model_type": "xlstm", "hidden_size": 96, "num_heads": 4}
renamed = xlstm | {"attribute_map": {"qk_head_dim": "mine"}, "mine": 12}
config = load(**renamed)
print(
    f"qk_head_dim of an xLSTM: {load(**xlstm).qk_head_dim}, with attribute_map:"
    f" {config.qk_head_dim}"
)
config.save_pretrained("again")
print(f"saved and loaded again: {AutoConfig.from_pretrained('again').qk_head_dim}")
try:
    print(f"qk_head_dim as a field: {load(**xlstm, qk_head_dim=12).qk_head_dim}")
except AttributeError as error:
    print(f"qk_head_dim as a field: {type(error).__name__}")
PYTHON
venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
