"""Hurts runs until they would break: `bazel run //xlstm/tools:soak -- --injuries=200`.

A short run is made once without a disturbance. Then the same run is made again and again in new
folders, and hurt at random moments: see `soak_injuries`. With `--processes=2` two processes train
together.

Started again after each injury, it must go on from the last checkpoint that is confirmed and whole,
and say what is wrong with later ones. Where it has to stop, it must say why. At its end metrics and
state must be those of the undisturbed run, bit for bit.
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

_INJURIES = flags.DEFINE_integer("injuries", 200, "How many injuries.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the injuries and their moments.")
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "How many processes train together.", lower_bound=1, upper_bound=2
)
_KINDS = flags.DEFINE_list("kinds", [], "Kinds of injuries; all if empty.")


@dataclasses.dataclass
class _Kind:
    """What is known of a kind of injury.

    Attributes:
        then: What the runs did.
        count: How often.
        sentence: What one said.
    """

    then: str
    count: int = 0
    sentence: str = ""


class Soak:
    """Runs in a folder, and what they must be like.

    Attributes:
        undisturbed: The run that is not hurt.
        kinds: What was done so far, by the injuries' names.
    """

    def __init__(self, folder: str, config: SoakConfig, rng: random.Random):
        """Makes the undisturbed run.

        Args:
            folder: Where everything goes.
            config: The run.
            rng: Chooses the moments, and what is damaged.

        Raises:
            AssertionError: If it does not end well.
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
        """Makes a run that is hurt, and compares it with the one that is not.

        Args:
            name: A folder of its own.
            injuries: What is done to it, in this order; then it is left in peace.
            after_each: Called after each.

        Returns:
            The injuries for which it was over too soon.

        Raises:
            AssertionError: If it does something else than it must.
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
        """The number of injuries so far."""
        return sum(kind.count for kind in self.kinds.values())

    def table(self) -> Table:
        """What was done, and what the runs did."""
        table = Table("injury", "", "the run", "and said, for example", box=box.SIMPLE)
        for name, kind in self.kinds.items():
            table.add_row(name, str(kind.count), kind.then, kind.sentence.replace("[", r"\["))
        return table


def _choose_injuries() -> list[Injury]:
    """The injuries to choose from, as the flags say."""
    suitable = injuries_for(_PROCESSES.value)
    names = sorted({injury.name for injury in suitable})
    unknown = [name for name in _KINDS.value if name not in names]
    if unknown:
        raise ValueError(f"--kinds={','.join(unknown)}: it must be of {', '.join(names)}")
    return [injury for injury in suitable if not _KINDS.value or injury.name in _KINDS.value]


def main(argv: list[str]) -> None:
    """Hurts runs, and prints what was done to them."""
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
            while len(deck) < total - soak.count():  # Each kind as often as any.
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
        f" {_SEED.value}) in {(time.monotonic() - begin) / 60:.0f} minutes: every one went on from"
        " its last confirmed and whole checkpoint, and ended with the metrics and the state of the"
        " undisturbed run, bit for bit",
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
