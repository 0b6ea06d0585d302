#!/bin/bash
# Scores a run, and its export in `transformers`, with the same tasks: from the root of a checkout,
#
#     xlstm/tools/harness/compare_with_transformers.sh RUN OUT
#
# prints the harness's tables of both, each with batches of 1 and of 8, and writes their answers to
# OUT/answers_*.json. Needs a package registry and about 8 GB of disk: OUT gets an environment with
# PyTorch. TRANSFORMERS and XLSTM are the commands to use in place of those.
set -eu
run=$(realpath "$1") out=$(realpath -m "$2")
readonly run out testdata=xlstm/tools/harness/testdata
export HF_HOME=$out/cache HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

if [[ ! ${TRANSFORMERS:-} ]]; then
  python3 -m venv "$out/environment"
  "$out/environment/bin/pip" install --quiet 'lm_eval[hf]==0.4.13' transformers==5.24.0
  TRANSFORMERS=$out/environment/bin/lm_eval
fi
: "${XLSTM:=./bazelw run --config=eval //xlstm/tools:lm_eval --}"
: "${CONVERT:=./bazelw run //xlstm/tools:convert --}"
[[ -d $out/export ]] || $CONVERT --from="$run" --to_hf="$out/export"

# Prints the table of some tasks: score NAME TASKS COMMAND...
score() {
  local name=$1 tasks=$2
  shift 2
  "$@" --include_path "$testdata" --tasks "$tasks" --log_samples \
    --output_path "$out/$name" > "$out/$name.log" 2>&1 || { tail "$out/$name.log"; return 1; }
  sed -n '/gen_kwargs: (/,$p' "$out/$name.log" | grep -v '^fatal:'
}

readonly choice_and_text=xlstm_choice,xlstm_generate
for size in 1 8; do
  score "xlstm_$size" $choice_and_text,xlstm_rolling \
    $XLSTM --model xlstm --model_args checkpoint="$run" --batch_size $size
  # With `add_bos_token`, the class `hf` counts the marker before a document as a token of it.
  model=pretrained=$out/export,dtype=float32
  hf=("$TRANSFORMERS" --model hf --device cpu --batch_size $size --model_args)
  score "hf_$size" $choice_and_text "${hf[@]}" $model,add_bos_token=True
  score "hf_rolling_$size" xlstm_rolling "${hf[@]}" $model,add_bos_token=False
done

# Collects the answers to all requests: of a choice its log-likelihood and whether it is greedy, of a
# document its log-likelihood, and texts.
python3 - "$out" << 'END'
import glob, json, sys


def answer(x):
    if isinstance(x, list):
        return [float(x[0]), x[1] == "True"]
    return float(x) if task == "xlstm_rolling" else x


for size in 1, 8:
    for model in "xlstm", "hf":
        answers = {}
        for path in glob.glob(f"{sys.argv[1]}/{model}*_{size}/*/samples_*.jsonl"):
            task = path.split("samples_")[-1].rsplit("_", 1)[0]
            samples = sorted(map(json.loads, open(path)), key=lambda sample: sample["doc_id"])
            answers[task] = [answer(x[0]) for sample in samples for x in sample["resps"]]
        with open(f"{sys.argv[1]}/answers_{model}_{size}.json", "w") as file:
            file.write(json.dumps(answers, sort_keys=True, ensure_ascii=False) + "\n")
END
