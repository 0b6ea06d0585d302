"""Tests with the harness itself, on tasks of our own and a checkpoint that `transformers` wrote."""

import glob
import json
import os
import shutil
import sys

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from xlstm.huggingface import convert
from xlstm.huggingface.convert import import_model
from xlstm.inference.load_model import load_run
from xlstm.testing.patience import PATIENCE
from xlstm.tools.harness import lm_eval_command
from xlstm.tools.harness.model import RunLM
from xlstm.tools.harness.task_files import check_task_files
from xlstm.tools.testing.start_tool import start_tool

TESTDATA = os.path.join(os.path.dirname(lm_eval_command.__file__), "testdata")
GOLDEN = os.path.join(os.path.dirname(convert.__file__), "testdata", "hf_xlstm_tiny")
TASKS = "xlstm_choice", "xlstm_rolling", "xlstm_generate"
# Groups, includes, functions and metrics of other packages.
_HARNESS_TASKS = [
    os.path.join(os.path.dirname(lm_eval.__file__), "tasks", name)
    for name in (
        "arc",
        "darija_bench",
        "hellaswag",
        "lambada",
        "mmlu",
        "wikitext",
        "gsm8k",
        "squadv2",
    )
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def rows(name):
    with open(os.path.join(TESTDATA, f"{name}.jsonl")) as file:
        return [json.loads(line) for line in file]


def import_golden(folder, *tokenizer_files):
    """Makes `run` of the checkpoint and files of the tokenizer; copies follow Bazel's links."""
    (folder / "model").mkdir()
    paths = [os.path.join(GOLDEN, name) for name in ("config.json", "model.safetensors")]
    paths += [os.path.join(TESTDATA, "tokenizer", name) for name in tokenizer_files]
    for path in paths:
        shutil.copy(path, folder / "model")
    import_model(str(folder / "model"), str(folder / "run"), lambda *args: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the checkpoint as a run."""
    folder = tmp_path_factory.mktemp("lm_eval")
    import_golden(folder, "tokenizer.json", "tokenizer_config.json")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return load_run(str(folder / "run"), mesh={"dp": 1})


def start(folder, *words, model_args="checkpoint=run", env=None):
    words = ["--model=xlstm", f"--model_args={model_args}", f"--include_path={TESTDATA}", *words]
    env = OFFLINE | {"HF_HOME": str(folder / "cache")} | (env or {})
    return start_tool(lm_eval_command, *words, env=env)


def answers(folder, process, name):
    """Waits for the harness; returns its output and its answers, as in transformers_answers."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    found = {}
    for task in TASKS:
        (path,) = glob.glob(str(folder / name / "*" / f"samples_{task}_*.jsonl"))
        with open(path) as file:
            samples = sorted(map(json.loads, file), key=lambda sample: sample["doc_id"])
        found[task] = [response[0] for sample in samples for response in sample["resps"]]
    found["xlstm_choice"] = [[float(x), y == "True"] for x, y in found["xlstm_choice"]]
    found["xlstm_rolling"] = [float(x) for x in found["xlstm_rolling"]]
    return output, found


@pytest.fixture(scope="module")
def scored(folder):
    """The outputs and answers of the harness with batches of 1, and of 8 on a mesh."""
    common = f"--tasks={','.join(TASKS)}", "--log_samples"
    checkpoint = f"checkpoint={folder / 'run'}"
    processes = {
        "one": start(folder, *common, f"--output_path={folder / 'one'}", model_args=checkpoint),
        "eight": start(
            folder,
            *common,
            f"--output_path={folder / 'eight'}",
            "--batch_size=8",
            model_args=f"{checkpoint},fsdp=2",
            env={"JAX_NUM_CPU_DEVICES": "2"},
        ),
    }
    return {name: answers(folder, process, name) for name, process in processes.items()}


def assert_same_answers(found, expected):
    for task in ("xlstm_choice", "xlstm_rolling"):
        pairs = zip(found[task], expected[task], strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, atol=1e-4, rtol=0)
    assert found["xlstm_generate"] == expected["xlstm_generate"]


def direct(run, context, continuation):
    """Returns the score of a text from the logits of the whole, summed in float64."""
    encode, whole = run.tokenizer.encode, context + continuation
    # The harness moves spaces from the end of a context to its continuation.
    context = context.rstrip(" ") if continuation else context
    continuation = whole[len(context) :]
    ids = [run.tokenizer.bos_id, *encode(context).tolist(), *encode(continuation).tolist()]
    logits = np.asarray(run.logits(ids[:-1]), np.float64)[-len(encode(continuation)) :]
    targets = np.array(ids[-len(logits) :])
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    is_greedy = bool(np.all(np.argmax(logits, axis=-1) == targets))
    return float(np.sum(log_probs[np.arange(len(targets)), targets])), is_greedy


def test_answers_are_those_of_a_direct_computation(scored, run):
    output, found = scored["one"]
    pairs = [(row["context"], choice) for row in rows("choice") for choice in row["choices"]]
    for answer, pair in zip(found["xlstm_choice"], pairs, strict=True):
        np.testing.assert_allclose(answer, direct(run, *pair), atol=1e-4, rtol=0)
    for answer, row in zip(found["xlstm_rolling"], rows("rolling"), strict=True):
        # The sum over a thousand tokens also has the relative error of float32.
        np.testing.assert_allclose(answer, direct(run, "", row["text"])[0], atol=1e-4, rtol=1e-7)
    num_bytes = sum(len(row["text"].encode()) for row in rows("rolling"))
    bits = -sum(found["xlstm_rolling"]) / num_bytes / np.log(2)
    assert f"|bits_per_byte  |↓  |{bits:8.4f}|" in output


def test_answers_are_those_of_transformers(scored):
    with open(os.path.join(TESTDATA, "transformers_answers.json")) as file:
        assert_same_answers(scored["one"][1], json.load(file))


def test_a_batch_on_a_mesh_gives_the_same_answers_and_table(scored):
    assert_same_answers(scored["eight"][1], scored["one"][1])
    tables = [output[output.index("|    Tasks") :] for output, _ in scored.values()]
    assert tables[0] == tables[1]


def test_a_task_that_does_not_exist_is_one_line(folder):
    process = start(folder, "--tasks=nowhere", env={"LMEVAL_LOG_LEVEL": "ERROR"})
    _, errors = process.communicate(timeout=PATIENCE)
    first, *others = errors.splitlines()
    assert first == "lm_eval: loading JAX and the harness ..."
    assert (process.returncode, others) == (2, ["error: Tasks not found: nowhere"])


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


class Cache:
    """Takes the place of the harness's cache."""

    def __init__(self):
        self.found = {}

    def add_partial(self, kind, arguments, answer):
        self.found[arguments[0]] = answer


@pytest.fixture
def model(folder):
    model = RunLM(str(folder / "run"), batch_size=2, dp=1)
    model.set_cache_hook(Cache())
    return model


def test_contexts_of_nothing_and_of_spaces_begin_with_the_marker(model, run):
    pairs = ("", "import"), ("  ", "import"), ("x", "")
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = [direct(run, "", "import"), direct(run, "", "  import"), (0.0, True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert model.cache_hook.found == {pair[0]: x for pair, x in zip(pairs, found, strict=True)}


def test_without_the_marker_a_context_is_its_tokens(folder):
    model = RunLM(str(folder / "run"), add_bos_token=False, dp=1)
    assert model.tok_encode("ab") == [3, 4]
    assert model.tok_encode("ab", add_special_tokens=True) == [0, 3, 4]


def test_a_document_is_read_whole_or_in_the_windows_of_hf(folder, model, run):
    texts = "import os\n", "", "x"
    given = requests("loglikelihood_rolling", *((text,) for text in texts))
    whole = model.loglikelihood_rolling(given, disable_tqdm=True)
    expected = [direct(run, "", "import os\n")[0], 0.0, direct(run, "", "x")[0]]
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    assert model.cache_hook.found == dict(zip(texts, whole, strict=True))
    windowed = RunLM(str(folder / "run"), batch_size=4, max_length=4, dp=1)
    (found, _, _) = windowed.loglikelihood_rolling(given, disable_tqdm=True)
    # The last window has the most context that it can.
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode("import os\n").tolist()]
    expected = 0
    for first, begin, end in ((0, 1, 5), (4, 5, 9), (6, 9, 11)):
        logits = np.asarray(run.logits(ids[first : end - 1]), np.float64)
        log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        expected += sum(log_probs[i - first - 1, ids[i]] for i in range(begin, end))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_texts_are_in_the_order_of_their_requests(model):
    greedy, short = {"until": ["zzz"], "max_gen_toks": 6}, {"until": "zzz", "max_gen_toks": 2}
    pairs = ("x", greedy), ("import o", short), ("def f(", greedy), ("x", short)
    found = model.generate_until(requests("generate_until", *pairs), disable_tqdm=True)
    alone = [
        model.generate_until(requests("generate_until", pair), disable_tqdm=True)[0]
        for pair in pairs
    ]
    assert found == alone
    assert found[0].startswith(found[3]) and len(found[3]) < len(found[0])


def test_the_seed_decides_what_is_sampled(model):
    hot = {"until": [], "do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_gen_toks": 20}
    texts = []
    for seed in (1, 1, 2):
        np.random.seed(seed)  # As `--seed` does.
        (text,) = model.generate_until(requests("generate_until", ("x", hot)), disable_tqdm=True)
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": None}, "model_args has no checkpoint"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"pretrained": "x"}, "model_args has 'pretrained': expected arguments among checkpoint,"),
        ({"tp": "two"}, "tp=two: expected a positive number"),
        ({"batch_size": "auto"}, "batch_size=auto: expected a number; the memory of a row"),
        ({"batch_size": "0"}, "batch_size=0: expected a positive number"),
        ({"batch_size": "many"}, "batch_size=many: expected a positive number"),
        ({"max_length": 0}, "max_length=0: expected a positive number"),
        ({"max_gen_toks": True}, "max_gen_toks=True: expected a positive number"),
        ({"add_bos_token": "maybe"}, "add_bos_token='maybe': expected True or False"),
    ],
)
def test_a_bad_argument_is_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        RunLM(**{"checkpoint": str(folder / "run")} | arguments)


def test_a_model_without_a_tokenizer_has_no_scores(tmp_path):
    import_golden(tmp_path)
    with pytest.raises(ValueError, match="run has no tokenizer"):
        RunLM(str(tmp_path / "run"))


def test_what_a_generation_cannot_do_is_named(model):
    with pytest.raises(ValueError, match="generation_kwargs has 'num_beams'"):
        model.generate_until(requests("generate_until", ("x", {"until": [], "num_beams": 2})))


def test_a_request_beyond_max_length_is_named(folder):
    model = RunLM(str(folder / "run"), max_length=3, dp=1)
    with pytest.raises(ValueError, match="max_length=3: it is less than the 6 tokens"):
        model.loglikelihood(requests("loglikelihood", ("x", "import")), disable_tqdm=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: broken\ndataset_path: [json\n", "task.yaml cannot be read: while parsing"),
        ("doc_to_choise: [a]", "task.yaml has a field 'doc_to_choise'; did you mean 'doc_to_cho"),
        ("metric_list: [{metric: acc_nrm}]", "task.yaml has a metric 'acc_nrm'; did you mean 'ac"),
        ("dataset_kwargs: {data_files: {test: nowhere.jsonl}}", "Unable to find .*nowhere.jsonl"),
        ('doc_to_text: "{{context"', "a task cannot be used: unexpected end of template"),
        ('doc_to_text: "{{nothing}}"', "a task cannot be used: 'nothing' is undefined"),
        ("output_type: nonsense", "invalid output_type 'nonsense'"),
    ],
)
def test_a_bad_file_of_a_task_is_named(folder, tmp_path, monkeypatch, content, message):
    with open(os.path.join(TESTDATA, "choice.yaml")) as file:
        whole = file.read()
    task = tmp_path / "task.yaml"
    task.write_text(content if content.startswith("task:") else f"{whole}\n{content}\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", os.getcwd())
    monkeypatch.setattr("sys.argv", [])
    words = "--model=xlstm", f"--model_args=checkpoint={folder / 'run'}", f"--tasks={task}"
    with pytest.raises((ValueError, OSError), match=message):
        lm_eval_command.main(["lm_eval", *words])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('task: "broken', "broken.yaml cannot be read: while scanning a quoted scalar"),
        ("- a list", "broken.yaml cannot be read: Expected YAML dict"),
        ("include: nowhere.yaml\ntask: broken", "broken.yaml cannot be read: .*nowhere.yaml"),
        ("task: broken\nconfusing: 1", "broken.yaml has a field 'confusing', which the harness"),
    ],
)
def test_a_bad_file_in_a_folder_of_tasks_is_named(tmp_path, content, message):
    (tmp_path / "broken.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        check_task_files([str(tmp_path)], ["broken"])


def test_a_folder_of_tasks_must_exist(tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected a folder with files of tasks"):
        check_task_files([str(tmp_path / "nowhere")], [])


def test_the_files_of_the_harness_and_ours_have_nothing_to_report():
    check_task_files([TESTDATA, *_HARNESS_TASKS], [])


def test_the_harness_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="lm_eval is not installed: give Bazel --config=eval, or"):
        lm_eval_command.main(["lm_eval"])


def test_a_chat_template_is_refused(model):
    assert model.chat_template(False) is None
    with pytest.raises(ValueError, match="no chat template"):
        model.chat_template(True)
