"""Tests of the manifest for Kubernetes: against schemas, and of processes in its environment."""

import json
import re
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from examples.clusters.small_run import (
    NUM_STEPS,
    install_command,
    install_packages,
    read_losses,
    read_recipe,
    train_flags,
    wait_for_all,
    write_data,
)
from xlstm.testing.patience import wait_until

_MANIFEST = Path(__file__).parent / "kubernetes" / "train.yaml"
# What Kubernetes puts into every container of a pod.
_SERVICE = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def _job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def _container(manifest):
    (container,) = _job(manifest)["template"]["spec"]["containers"]
    return container


def _environments(manifest):
    """Returns the environment of each pod's container, as Kubernetes and JobSet make it."""
    assert manifest["spec"]["coordinator"]["podIndex"] == 0
    return [_environment(manifest, index) for index in range(_job(manifest)["completions"])]


def _environment(manifest, index):
    annotations = {
        "batch.kubernetes.io/job-completion-index": str(index),
        # JobSet writes the name of the first pod; here all pods are on this machine.
        "jobset.sigs.k8s.io/coordinator": "localhost",
    }
    environment = _SERVICE | {"JOB_COMPLETION_INDEX": str(index)}
    for entry in _container(manifest)["env"]:
        if "value" in entry:
            value = re.sub(r"\$\((\w+)\)", lambda x: environment[x[1]], entry["value"])
        else:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            value = annotations[re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)[1]]
        environment[entry["name"]] = value
    return environment


@pytest.fixture(scope="module")
def manifest():
    """The manifest, with a port that is free on this machine."""
    return read_recipe(_MANIFEST)


@pytest.fixture(scope="module")
def start(tmp_path_factory, manifest):
    """A function that starts the processes of all pods, and the folder of their run."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*train_flags(folder / "run", write_data(folder)), "--simulate_devices=2"]
    path = install_command(folder, flags)["PATH"]

    def start(*more_words):
        return [
            subprocess.Popen(
                ["xlstm-lm", *_container(manifest)["args"], *more_words],
                env={"PATH": path} | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for environment in _environments(manifest)
        ]

    return start, folder / "run"


def test_an_evicted_pod_makes_all_pods_fail_and_they_resume(start, manifest, tmp_path):
    start, workdir = start
    processes = start()
    wait_until(lambda: len(read_losses(workdir)) > 5, processes[0], interval=0.1)
    processes[1].send_signal(signal.SIGTERM)
    statuses, output = wait_for_all(processes)
    step = int(re.search(r"stopped after step ([\d,]+), which is saved", output)[1])
    assert 0 < step < NUM_STEPS
    # The rules of the manifest start such pods again.
    rules = _job(manifest)["podFailurePolicy"]["rules"]
    assert set(statuses) == {75} and not any(75 in x["onExitCodes"]["values"] for x in rules)

    statuses, output = wait_for_all(start())
    assert set(statuses) == {0}, output
    assert f"resuming from step {step}" in output

    environment = install_command(tmp_path)
    words = ["xlstm-lm", "train", *train_flags(tmp_path / "alone", workdir.parent / "store")]
    subprocess.run([*words, "--simulate_devices=4"], env=environment, check=True)
    alone, found = read_losses(tmp_path / "alone"), read_losses(workdir)
    assert [x[:2] for x in found] == [x[:2] for x in alone]
    assert [x[2] for x in found] == pytest.approx([x[2] for x in alone], rel=1e-5)


def test_bad_input_is_not_started_again(start, manifest):
    start, _ = start
    statuses, output = wait_for_all(start("--no_such_flag"))
    assert "error: there is no flag --no_such_flag" in output
    ((rule,), (outer,)) = (
        _job(manifest)["podFailurePolicy"]["rules"],
        manifest["spec"]["failurePolicy"]["rules"],
    )
    assert rule["action"] == "FailJob" and set(statuses) == set(rule["onExitCodes"]["values"])
    assert outer["action"] == "FailJobSet" and "PodFailurePolicy" in outer["onJobFailureReasons"]


def test_the_numbers_of_pods_are_equal(manifest):
    (count,) = (x["value"] for x in _container(manifest)["env"] if x["name"] == "JAX_NUM_PROCESSES")
    assert int(count) == _job(manifest)["completions"] == _job(manifest)["parallelism"]
    ports = [x["containerPort"] for x in _container(manifest)["ports"]]
    address = _environments(manifest)[0]["JAX_COORDINATOR_ADDRESS"]
    assert address == f"localhost:{ports[0]}"


def test_the_flags_of_the_manifest_exist(manifest, tmp_path):
    flags = [x for x in _container(manifest)["args"] if x.startswith("--config")]
    assert len(flags) > 3
    environment = install_command(tmp_path)
    words = ["xlstm-lm", "show_config", *flags]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)


# Fields that a schema does not know are left out of `to_dict`.
_VALIDATE = textwrap.dedent("""
    import json, sys
    import kubernetes_validate
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    manifest = json.load(sys.stdin)
    known = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    for inner in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "spec": inner["template"]["spec"]}
        kubernetes_validate.validate(job, "1.37", strict=True)
    sys.exit(0 if known == manifest else "there is an unknown field")
""")


@pytest.fixture(scope="module")
def is_valid(tmp_path_factory):
    """A function that validates a manifest against the schemas of JobSet and Kubernetes."""
    python = install_packages(
        tmp_path_factory.mktemp("schemas"),
        "kubernetes-validate==1.37.0",
        "kubeflow-trainer-api==2.3.0",
    )

    def is_valid(manifest):
        words = [python, "-c", _VALIDATE]
        done = subprocess.run(words, input=json.dumps(manifest), text=True, capture_output=True)
        print(done.stderr[-500:])
        return done.returncode == 0

    return is_valid


def test_the_manifest_fits_the_schemas(is_valid):
    assert is_valid(yaml.safe_load(_MANIFEST.read_text()))


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("maxRestarts", "maxRestart"),
        ("jobIndex: 0", "jobIndex: first"),
        ("onExitCodes", "onExitStatus"),
        ("terminationGracePeriodSeconds", "terminationGraceSeconds"),
    ],
)
def test_the_schemas_reject_mistakes(is_valid, right, wrong):
    text = _MANIFEST.read_text()
    assert right in text
    assert not is_valid(yaml.safe_load(text.replace(right, wrong)))
