import collections
import threading

import pytest

from xlstm.testing.patience import PATIENCE
from xlstm.trainer.base import coordinator
from xlstm.trainer.base.coordinator import check_agreement, describe_difference


class _Exchange:
    """A coordinator between threads that simulate processes."""

    def __init__(self, num_processes):
        self.texts, self.read = collections.defaultdict(dict), []
        self._local, self._barrier = threading.local(), threading.Barrier(num_processes)
        self._num_processes = num_processes

    def num_processes(self):
        return self._num_processes

    def publish(self, topic, text):
        self.texts[topic][self._local.process] = text

    def published_by_all(self, topic):
        return dict(self.texts[topic])

    def published_by(self, topic, process):
        self.read.append(process)
        return self.texts[topic][process]

    def wait_until_published(self, topic, seconds):
        self._barrier.wait(timeout=PATIENCE)

    def check(self, all_facts):
        """Returns the error of each process, given the facts of each; None for no error."""
        heard = {}

        def run(process, facts):
            self._local.process = process
            try:
                heard[process] = check_agreement("topic", lambda: facts)
            except ValueError as error:
                heard[process] = str(error)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(all_facts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return heard


@pytest.fixture
def exchange(monkeypatch):
    exchange = _Exchange(3)
    for name in (
        "num_processes",
        "publish",
        "published_by_all",
        "published_by",
        "wait_until_published",
    ):
        monkeypatch.setattr(coordinator, name, getattr(exchange, name))
    # All threads share this counter, of which every process has its own.
    monkeypatch.setattr(coordinator, "_uses", collections.defaultdict(_SameNumber))
    return exchange


class _SameNumber(int):
    def __add__(self, other):
        return self


def test_processes_that_agree_send_digests_alone(exchange):
    assert exchange.check([{"x": {"lr": 0.1}}] * 3) == {0: None, 1: None, 2: None}
    assert exchange.read == []
    assert all(len(digest) == 64 for digest in exchange.texts["topic_0"].values())


def test_every_process_hears_of_the_first_difference(exchange):
    same = {"start anew": {"seed": 1, "lr": 0.1}}
    heard = exchange.check([same, same, {"start anew": {"seed": 1, "lr": 0.2}}])
    sentence = "process 2 has lr=0.2, process 0 has lr=0.1: start anew"
    assert heard == dict.fromkeys(range(3), sentence)


def test_one_process_agrees_with_itself():
    check_agreement("topic", lambda: pytest.fail("there is nobody to compare facts with"))


@pytest.mark.parametrize(
    "first, other, sentence",
    [
        ({"do": {"a": 1}}, {"do": {"a": "1"}}, "process 1 has a='1', process 0 has a=1: do"),
        ({"do": {"a": None}}, {"do": {}}, "process 1 has no a, process 0 has a=None: do"),
        ({"do": {}}, {"do": {"a": None}}, "process 1 has a=None, process 0 has no a: do"),
        ({}, {"do": {"a": 1}}, "process 1 has a=1, process 0 has no a: do"),
        (
            {"do": {"a": 1, "b": 1}, "or": {"c": 1}},
            {"do": {"a": 1, "b": 2}, "or": {"c": 2}},
            "process 1 has b=2, process 0 has b=1: do",
        ),
    ],
)
def test_a_difference_is_named(first, other, sentence):
    assert describe_difference(first, other, 1) == sentence
