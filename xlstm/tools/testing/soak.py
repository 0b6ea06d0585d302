"""Injures runs at random moments and checks that they recover.

    bazel run //xlstm/tools:soak -- --injuries=200

One short run is left undisturbed. Then the same run is repeated in new folders and injured at
random moments; see `soak_injuries`. With `--processes=2`, two processes train together.

After each injury the run is started again. It must resume from the last checkpoint that is
confirmed and complete, and report what is wrong with later ones. Where it has to stop, it must say
why. At the end, its metrics and its state must equal those of the undisturbed run bit for bit.
"""

import dataclasses
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable

from absl import flags
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xlstm.tools.command_line import run
from xlstm.tools.testing.soak_injuries import Injury, injuries_for
from xlstm.tools.testing.soak_run import HurtRun, RunIsOver, SoakConfig, write_soak_store

_INJURIES = flags.DEFINE_integer("injuries", 200, "Number of injuries.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the injuries and their moments.")
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Number of processes that train together.", lower_bound=1, upper_bound=2
)
_KINDS = flags.DEFINE_list("kinds", [], "Kinds of injuries. By default all kinds are used.")


@dataclasses.dataclass
class _Kind:
    """The results of one kind of injury.

    Attributes:
        then: What the runs did.
        count: The number of injuries.
        sentence: A message that one run printed.
    """

    then: str
    count: int = 0
    sentence: str = ""


class Soak:
    """Injured runs in a folder, and the undisturbed run that they must equal.

    Attributes:
        undisturbed: The run without injuries.
        kinds: The results so far, by the names of the injuries.
    """

    def __init__(self, folder: str, config: SoakConfig, rng: random.Random):
        """Makes the undisturbed run.

        Args:
            folder: The folder for everything.
            config: The run.
            rng: Chooses the moments and what is damaged.

        Raises:
            AssertionError: If the run fails.
        """
        self._folder, self._config, self._rng = folder, config, rng
        self.kinds: dict[str, _Kind] = {}
        write_soak_store(folder)
        self.undisturbed = self._run("undisturbed")
        self.undisturbed.start()
        self.undisturbed.finish()

    def _run(self, name: str) -> HurtRun:
        return HurtRun(self._folder, name, self._config, self._rng)

    def hurt(
        self,
        name: str,
        injuries: Iterable[Injury],
        after_each: Callable[[], None] = lambda: None,
    ) -> list[Injury]:
        """Makes a run, injures it, and compares it with the undisturbed one.

        Args:
            name: The name of the run's folder.
            injuries: The injuries, in this order; then the run is left to finish.
            after_each: Called after each injury.

        Returns:
            The injuries for which the run ended too early.

        Raises:
            AssertionError: If the run does not do what it must.
        """
        hurt_run, left = self._run(name), list(injuries)
        try:
            while left:
                injury = left[0]
                sentence = injury.hurt(hurt_run)
                kind = self.kinds.setdefault(injury.name, _Kind(injury.then))
                kind.count += 1
                kind.sentence = kind.sentence or sentence
                left.pop(0)
                after_each()
            hurt_run.start()
        except RunIsOver:
            pass
        except BaseException:
            hurt_run.send(signal.SIGKILL)
            raise
        hurt_run.finish()
        hurt_run.compare(self.undisturbed)
        return left

    def count(self) -> int:
        """Returns the number of injuries so far."""
        return sum(kind.count for kind in self.kinds.values())

    def table(self) -> Table:
        """Returns a table of the injuries and what the runs did."""
        table = Table("injury", "count", "then", "message, for example", box=box.SIMPLE)
        for name, kind in self.kinds.items():
            table.add_row(name, str(kind.count), kind.then, kind.sentence.replace("[", r"\["))
        return table


def _choose_injuries() -> list[Injury]:
    """Returns the injuries to choose from, as the flags say."""
    suitable = injuries_for(_PROCESSES.value)
    names = sorted({injury.name for injury in suitable})
    unknown = [name for name in _KINDS.value if name not in names]
    if unknown:
        raise ValueError(f"--kinds={','.join(unknown)}: expected some of {', '.join(names)}")
    return [injury for injury in suitable if not _KINDS.value or injury.name in _KINDS.value]


def main(argv: list[str]) -> None:
    """Injures runs as the flags say, and prints a table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    begin, suitable = time.monotonic(), _choose_injuries()
    folder = tempfile.mkdtemp(prefix="soak-")
    console, runs, total = Console(), 0, _INJURIES.value
    rng = random.Random(_SEED.value)
    soak = Soak(folder, SoakConfig(num_processes=_PROCESSES.value), rng)
    columns = TextColumn("injuries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    deck: list[Injury] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("soak", total=total)
        while soak.count() < total:
            while len(deck) < total - soak.count():  # Every kind occurs equally often.
                deck += rng.sample(suitable, len(suitable))
            deck = soak.hurt(
                f"run_{runs}", deck[: total - soak.count()], lambda: progress.advance(task)
            )
            shutil.rmtree(f"{folder}/run_{runs}")
            runs += 1
    shutil.rmtree(folder)
    console.print(soak.table())
    console.print(
        f"{runs} runs of {_PROCESSES.value} processes with {soak.count()} injuries (seed"
        f" {_SEED.value}) in {(time.monotonic() - begin) / 60:.0f} minutes: every run resumed from"
        " its last confirmed and complete checkpoint, and ended with the metrics and the state of"
        " the undisturbed run, bit for bit",
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
