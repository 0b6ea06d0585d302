"""Tests with the real package offline, and with a fake package for what needs a server."""

import json
import sys
import types

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from xlstm.trainer.logger.jsonl import JsonLinesLogger
from xlstm.trainer.logger.wandb_logger import WandbLogger, check_wandb


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Keeps the package away from the user's files."""
    folder = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", folder)
        patch.setenv("NETRC", folder + "/netrc")
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_MODE", "offline")
        yield
        wandb.teardown()


def _train(workdir, first_step, steps):
    """Logs like a run, with an evaluation at its end."""
    metrics = JsonLinesLogger(str(workdir / "metrics.jsonl"), first_step)
    ours = WandbLogger(
        str(workdir),
        "a project",
        "a run",
        {"model": {"num_heads": 4}},
        str(workdir / "metrics.jsonl"),
    )
    for logger in (metrics, ours):
        for step in steps:
            logger.log(step, {"loss": 1 / step, "tokens": 128.0 * step})
        logger.log(steps[-1], {"val_loss": 0.5})
        logger.close()


def _records(folder):
    """Reads the records in the file of an offline start."""
    (path,) = folder.glob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    records = []
    while (data := store.scan_data()) is not None:
        records.append(Record.FromString(data))
    return records


def _history(records):
    rows = []
    for record in records:
        if record.HasField("history"):
            values = {
                (x.key or x.nested_key[0]): json.loads(x.value_json) for x in record.history.item
            }
            rows.append({k: v for k, v in values.items() if k not in ("_timestamp", "_runtime")})
    return rows


@pytest.fixture(scope="module")
def starts(tmp_path_factory, elsewhere):
    """The records of two starts, the second of which does the last two steps again."""
    workdir = tmp_path_factory.mktemp("run")
    _train(workdir, 0, [1, 2, 3])
    (first,) = (workdir / "wandb").glob("offline-run-*")
    first = first.rename(workdir / "first")  # Its name is the time in seconds.
    _train(workdir, 2, [2, 3, 4])
    (second,) = (workdir / "wandb").glob("offline-run-*")
    wandb.teardown()  # Waits until the files are written, like the end of a process.
    return _records(first), _records(second)


def test_rows_are_steps_of_an_offline_run(starts):
    first, _ = starts
    rows = _history(first)
    assert [row.pop("_step") for row in rows] == [1, 2, 3]
    assert rows[1] == {"loss": 0.5, "tokens": 256.0}
    assert rows[2] == {"loss": 1 / 3, "tokens": 384.0, "val_loss": 0.5}
    (run,) = [record.run for record in first if record.HasField("run")]
    assert (run.project, run.display_name) == ("a project", "a run")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["model"] == {"num_heads": 4}
    assert any(record.HasField("exit") for record in first)  # The run is closed.


def test_another_start_is_the_same_run_and_has_each_step_once(starts):
    first, second = (next(r.run for r in records if r.HasField("run")) for records in starts)
    assert first.run_id == second.run_id
    rows = _history(starts[1])
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [1.0, 0.5, 1 / 3, 0.25]


class _Server(types.SimpleNamespace):
    """Fake of the package, and of a server that has the steps below `next_step`."""

    class Error(Exception):
        pass

    def __init__(self, monkeypatch, next_step=0, failure=None):
        super().__init__(starts=[], rows=[], next_step=next_step, failure=failure, step=next_step)
        self.errors = types.SimpleNamespace(Error=self.Error)
        self.settings = types.SimpleNamespace(mode="online")
        monkeypatch.setitem(sys.modules, "wandb", self)

    def setup(self):
        return self

    def Settings(self, **_):  # noqa: N802 (the name in the package)
        return None

    def login(self):
        if self.failure:
            raise self.failure

    def init(self, **arguments):
        self.login()
        self.starts.append(arguments)
        return self

    def log(self, row, step):
        self.login()
        self.rows.append((step, row))

    def finish(self):
        self.login()


def test_a_server_is_sent_what_it_lacks(tmp_path, monkeypatch):
    server = _Server(monkeypatch)
    _train(tmp_path, 0, [1, 2, 3])
    # The last step was lost on the way.
    server.step, server.rows = 3, []
    _train(tmp_path, 4, [4])
    assert server.rows == [
        (3, {"loss": 1 / 3, "tokens": 384.0}),
        (3, {"val_loss": 0.5}),
        (4, {"loss": 0.25, "tokens": 512.0}),
        (4, {"val_loss": 0.5}),
    ]
    assert [start["resume"] for start in server.starts] == ["allow", "allow"]
    assert server.starts[0]["id"] == server.starts[1]["id"]


def test_a_server_is_not_sent_what_it_has(tmp_path, monkeypatch):
    server = _Server(monkeypatch, next_step=3)
    _train(tmp_path, 0, [1, 2, 3])  # Killed after step 2, before a checkpoint.
    assert [step for step, _ in server.rows] == [3, 3]


def test_a_run_goes_on_without_it(tmp_path, monkeypatch):
    server = _Server(monkeypatch)
    metrics = str(tmp_path / "metrics.jsonl")
    logger = WandbLogger(str(tmp_path), "project", "run", {}, metrics)
    logger.log(1, {"loss": 1.0})
    server.failure = ConnectionResetError("Connection lost")
    with pytest.warns(UserWarning, match=r"Weights & Biases failed \(Connection lost\)"):
        logger.log(2, {"loss": 1.0})
    logger.log(3, {"loss": 1.0})
    logger.close()
    assert server.rows == [(1, {"loss": 1.0})]


def test_without_a_key_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    for attempt in (
        check_wandb,
        lambda: WandbLogger(str(tmp_path), "project", "run", {}, str(tmp_path / "metrics.jsonl")),
    ):
        with pytest.raises(ValueError, match="No API key configured.*WANDB_API_KEY") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    check_wandb()  # Offline needs no key.


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logger\.wandb=True needs the package wandb"):
        check_wandb()
