"""The injuries of the soak, and what a run must do after each of them."""

import dataclasses
import itertools
import os
import re
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable

from xlstm.tools.testing import ruinous_train
from xlstm.tools.testing.soak_run import TERMINAL_LOST, HurtRun, RunIsOver

_SECONDS_ALONE = 120  # The longest time that a process may outlive another one of its run.
_STEPS_OF_STREAK = 60  # More than a ruinous start lasts.


@dataclasses.dataclass(frozen=True)
class Injury:
    """A kind of injury.

    Attributes:
        name: The name of the kind.
        then: What the run must do, in words.
        hurt: Takes a run that is not running, starts it as often as needed, injures it and checks
            what it does; afterwards it is not running. Returns the message of a run that had to
            stop, else "". Raises RunIsOver or AssertionError.
        processes: The numbers of processes that it applies to.
        share: The relative frequency.
    """

    name: str
    then: str
    hurt: Callable[[HurtRun], str]
    processes: tuple[int, ...] = (1, 2)
    share: int = 1


def _kill(run: HurtRun) -> str:
    run.start()
    run.wait_for_moment()
    run.kill()
    return ""


def _kill_while_writing(run: HurtRun) -> str:
    run.start()
    run.wait_for_moment()
    while not run.is_writing():
        run.check_runs()
        time.sleep(0.0002)
    time.sleep(run.rng.uniform(0, 0.05))
    run.kill()
    return ""


def _stop(run: HurtRun, number: signal.Signals) -> str:
    run.start()
    in_training = run.wait_for_moment(in_training=run.config.num_processes > 1)
    index = run.rng.randrange(run.config.num_processes)
    run.send(number, index)
    statuses = run.join()
    if in_training and run.last_row_step() < run.config.num_steps:
        run.check(not any(statuses), f"stopped with {statuses} after {number.name}")
        _check_stopped(run)
    else:  # The signal came before training began or after it ended.
        allowed = (0, -number, 130) if number == signal.SIGINT else (0, -number)
        run.check(statuses[index] in allowed, f"ended with {statuses} after {number.name}")
    return ""


def _check_stopped(run: HurtRun) -> None:
    """Checks that a run that was asked to stop has saved its last step."""
    found = re.search(r"stopped after step ([\d,]+)", run.log())
    if found:
        step = int(found[1].replace(",", ""))
        run.check(step == run.last_row_step(), f"has other rows than of step {step}")
    newest = max(run.confirmed_steps(), default=0)
    run.check(newest == run.last_row_step(), f"has not saved step {run.last_row_step()}")


def _pause(run: HurtRun) -> str:
    run.start()
    run.wait_for_moment()
    index = run.rng.randrange(run.config.num_processes)
    run.send(signal.SIGSTOP, index)
    time.sleep(run.rng.uniform(0.5, 4))
    run.send(signal.SIGCONT, index)
    run.wait_for_steps(3)
    run.kill()
    return ""


def _damage(run: HurtRun, how: str) -> str:
    """Damages the newest of several checkpoints."""
    run.start()
    run.wait_for_moment()
    while len(run.confirmed_steps()) < 2:
        run.check_runs()
        time.sleep(0.02)
    run.kill()
    step = run.confirmed_steps()[-1]
    folder = run.checkpoint_path(step)
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    victim = run.rng.choice(sorted(path for path in paths if os.path.getsize(path)))
    if how == "torn":
        os.remove(os.path.join(folder, "checksums.json"))
    elif how == "removed":
        os.remove(victim)
    elif how == "cut off":
        os.truncate(victim, run.rng.randrange(os.path.getsize(victim)))
    else:
        _flip_bit(run, victim)
    run.mark_damaged(step)
    return ""


def _flip_bit(run: HurtRun, path: str) -> None:
    offset = run.rng.randrange(os.path.getsize(path))
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << run.rng.randrange(8))]))


def _close_pipe(run: HurtRun) -> str:
    """Closes the reader of the output, as in `train | head`."""
    reader, writer = os.pipe()
    run.start(output=writer, errors=run.rng.choice((None, writer)))
    os.close(writer)
    is_over = threading.Event()

    def read() -> None:
        with open(run.log_path(0), "ab", buffering=0) as log:
            while not is_over.is_set():
                if select.select([reader], [], [], 0.05)[0]:
                    log.write(os.read(reader, 4096))
        os.close(reader)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        run.wait_for_moment()
    finally:
        is_over.set()
        thread.join()
    # The run prints something at the next evaluation, and logs a row of metrics after it.
    interval = run.config.eval_interval
    reported_by = (run.last_row_step() // interval + 1) * interval + 3
    try:
        run.wait_for_steps(reported_by - run.last_row_step())
        return _stop_without_terminal(run, reported_by)
    except RunIsOver:
        return _check_without_terminal(run, reported_by)


def _fill_disk_of_log(run: HurtRun) -> str:
    reported_by = run.last_row_step() + 1  # If all steps are done, no row is logged.
    with open("/dev/full", "w") as full:
        run.start(output=full, errors=run.rng.choice((None, full)))
    try:
        run.wait_for_moment(in_training=True)
        return _stop_without_terminal(run, reported_by)
    except RunIsOver:
        return _check_without_terminal(run, reported_by)


def _stop_without_terminal(run: HurtRun, reported_by: int) -> str:
    run.send(signal.SIGTERM)
    sentence = _check_without_terminal(run, reported_by)
    _check_stopped(run)
    return sentence


def _check_without_terminal(run: HurtRun, reported_by: int) -> str:
    """Checks that the run has succeeded and its metrics mark the lost terminal by a step."""
    statuses = run.join()
    run.check(not any(statuses), f"ended with {statuses} without a terminal")
    is_reported = any(TERMINAL_LOST in row for row in run.all_rows())
    run.check(is_reported or run.last_row_step() < reported_by, "does not report the lost terminal")
    said = re.search(".*cannot be written.*", run.log())
    return said[0] if said else ""


def _damage_store(run: HurtRun) -> str:
    """Changes the store's bytes between two starts, and then restores them."""
    tokens = os.path.join(run.store, "tokens.bin")
    shutil.copy2(tokens, f"{run.store}.backup")
    if run.rng.random() < 0.5:
        _flip_bit(run, tokens)
    else:  # Another file replaces it, sometimes while the run is running.
        if run.rng.random() < 0.5:
            run.start()
            run.wait_for_moment()
        with open(f"{tokens}.new", "wb") as file:
            file.write(bytes(os.path.getsize(tokens)))
        os.rename(f"{tokens}.new", tokens)
        if run.processes and run.processes[0].poll() is None:
            run.kill()
    try:
        return _refused(run, "the token store .* damaged")
    finally:
        os.rename(f"{run.store}.backup", tokens)


def _shrink_store(run: HurtRun) -> str:
    """Truncates the store while it is in use, and then restores it."""
    tokens = os.path.join(run.store, "tokens.bin")
    with open(tokens, "rb") as file:
        content = file.read()
    run.start()
    run.wait_for_moment(in_training=True)
    os.truncate(tokens, run.rng.randrange(len(content) // 2))
    try:
        statuses = run.join(_SECONDS_ALONE)
    finally:
        with open(tokens, "r+b") as file:
            file.write(content)
    if not any(statuses):
        raise RunIsOver
    return _stopped(run, statuses, "tokens.bin")


def _stopped(run: HurtRun, statuses: list[int], reason: str) -> str:
    """Checks that a run has stopped and says why; returns its message."""
    errors = run.errors()
    run.check(all(statuses), f"ended with {statuses}")
    run.check(2 in statuses and errors, f"ended with {statuses} and says {errors}")
    named = [error for error in errors if re.search(reason, error)]
    run.check(named, f"does not say {reason!r} but {errors}")
    return named[0]


def _refused(run: HurtRun, reason: str, last: tuple[str, ...] = (), **options: str) -> str:
    """Checks that every process refuses to start and changes nothing; returns the message."""
    before = run.files()
    run.prepare()
    end = run.config.num_processes - 1
    for index in range(end):
        run.launch(index)
    run.launch(end, *last, **options)
    statuses = run.wait(_SECONDS_ALONE)
    run.check(set(statuses) == {2}, f"was not refused ({reason}) but ended with {statuses}")
    run.check(run.files() == before, "was changed by a start that was refused")
    for index in range(end + 1):
        said = re.search(f"^error: .*{reason}", run.log(index), re.MULTILINE)
        run.check(said, f"does not say {reason!r} but {run.errors()}")
    return run.errors()[0]


def _ruin(run: HurtRun) -> str:
    """Makes a streak of bad steps, and checks that no checkpoint in it is confirmed."""
    interval = run.config.checkpoint_interval
    first = max(run.confirmed_steps(), default=0)
    good = first + run.rng.randint(interval, 3 * interval)
    if good + _STEPS_OF_STREAK > run.config.num_steps:
        run.start()
        raise RunIsOver
    policy = run.rng.choice(("stop", "skip"))  # `rollback` would change the run.
    run.start(
        f"--ruin_after={good}",
        f"--ruinous_lr={run.rng.choice((1e3, 1e38))}",
        f"--config.trainer.nan_policy={policy}",
        tool=ruinous_train,
    )
    last = (good // interval + run.rng.randint(1, 2)) * interval + 2
    try:
        while run.last_row_step() < last:
            run.check_runs()
            time.sleep(0.005)
        run.send(run.rng.choice((signal.SIGTERM, signal.SIGKILL)))
        run.join()
    except RunIsOver:
        _stopped(run, run.join(_SECONDS_ALONE), "diverged.* checkpoint|not sound")
    confirmed = [step for step in run.confirmed_steps() if step > good]
    run.check(not confirmed, f"confirmed {confirmed}, though steps after {good} were bad")
    said = re.search("^step .* is not sound.*|^training diverged.*", run.log(), re.MULTILINE)
    return next(iter(run.errors()), said[0] if said else "")


def _rival(run: HurtRun) -> str:
    """Starts another process that trains in the same folder."""
    run.start()
    run.wait_for_moment(in_training=True)
    run.send(signal.SIGSTOP)
    first = run.processes.pop()
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    before = run.files()
    rival = run.launch(0)
    try:
        status = rival.wait(_SECONDS_ALONE)
        run.check(status == 2, f"was not alone: another process ended with {status}")
        run.check(run.files() == before, "was changed by another process")
    finally:
        rival.kill()
        run.processes = [first]
        run.send(signal.SIGCONT)
    run.wait_for_steps(2)
    sentence = _stopped_rival(run)
    run.kill()
    return sentence


def _stopped_rival(run: HurtRun) -> str:
    said = [error for error in run.errors() if "another process is training" in error]
    run.check(said, f"says {run.errors()} to another process")
    return said[0]


# Flags of the last process only, and the word in the error about each.
_DIFFERENCES = (
    ("--config.schedule.peak_lr=0.002", "peak_lr"),
    ("--config.trainer.seed=1", "seed"),
    ("--config.data.batch_size=16", "batch_size"),
    ("--config.trainer.num_steps=77", "num_steps"),
    ("--config.model.embedding_dim=64", "embedding_dim"),
)


def _differ(run: HurtRun) -> str:
    """Gives the last process another configuration."""
    flag, name = run.rng.choice(_DIFFERENCES)
    return _refused(run, name, (flag,))


def _differ_in_store(run: HurtRun) -> str:
    """Gives the last process other bytes under the path of the store."""
    other = f"{run.path}.other"
    shutil.copytree(run.store, os.path.join(other, "store"))
    _flip_bit(run, os.path.join(other, "store", "tokens.bin"))
    try:
        return _refused(run, "store", cwd=other)
    finally:
        shutil.rmtree(other)


def _differ_in_workdir(run: HurtRun) -> str:
    """Gives the last process a run folder of its own."""
    other = f"{run.path}.other"
    sentence = _refused(run, "workdir|folder", (f"--workdir={other}",))
    files = [name for _, _, names in os.walk(other) for name in names]
    run.check(not files, f"has left {files} in another folder")
    shutil.rmtree(other, ignore_errors=True)
    return sentence


def _differ_in_number(run: HurtRun) -> str:
    """Lets the last process expect one process more."""
    return _refused(run, "num_processes|processes", ("--num_processes=3",))


def _miss_one(run: HurtRun) -> str:
    """Starts all processes but the last one."""
    before = run.files()
    run.prepare()
    run.launch(0, "--connect_seconds=5")
    statuses = run.wait(_SECONDS_ALONE)
    run.check(statuses == [2] and run.errors(), f"ended alone with {statuses}: {run.errors()}")
    run.check(run.files() == before, "was changed by one of its processes alone")
    return run.errors()[0]


def _start_late(run: HurtRun) -> str:
    run.prepare()
    run.launch(0)
    time.sleep(run.rng.uniform(1, 8))
    run.launch(1)
    run.wait_for_moment(in_training=True)
    run.kill()
    return ""


def _kill_one(run: HurtRun) -> str:
    run.start()
    run.wait_for_moment(in_training=True)
    victim = run.rng.randrange(2)
    run.send(signal.SIGKILL, victim)
    statuses = run.join(_SECONDS_ALONE)
    if statuses[1 - victim] == 0 and run.last_row_step() == run.config.num_steps:
        raise RunIsOver
    other = 1 - victim
    run.check(statuses[other] != 0, f"ended with {statuses} when one was killed")
    # The process reports it, or JAX does when the coordinator is gone.
    said = re.search("^error: .*|Terminating process because.*", run.log(other), re.MULTILINE)
    run.check(said, "printed nothing after one was killed")
    return said[0]


def _of_signal(number: signal.Signals) -> Injury:
    then = "saved the last step, status 0"
    return Injury(number.name, then, lambda run: _stop(run, number))


def _of_checkpoint(how: str) -> Injury:
    then = "named it, and resumed from the one before"
    return Injury(f"checkpoint {how}", then, lambda run: _damage(run, how))


_ON, _REFUSED = "resumed from the last checkpoint", "refused to start, status 2"
INJURIES = (
    Injury("SIGKILL", _ON, _kill, share=2),
    Injury("SIGKILL while writing", _ON, _kill_while_writing, share=2),
    *map(_of_signal, (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)),
    Injury("paused", "continued", _pause),
    *map(_of_checkpoint, ("flipped", "cut off", "removed", "torn")),
    Injury("closed pipe", "trained on, and recorded it in its metrics", _close_pipe),
    Injury("full disk of the log", "trained on, and recorded it in its metrics", _fill_disk_of_log),
    Injury("damaged store", _REFUSED, _damage_store),
    Injury("shrunk store", "stopped, status 2", _shrink_store),
    Injury("streak of bad steps", "resumed from before the streak", _ruin, share=2),
    Injury("second run in the folder", _REFUSED, _rival, (1,)),
    Injury("other configuration", _REFUSED, _differ, (2,), share=3),
    Injury("other store", _REFUSED, _differ_in_store, (2,)),
    Injury("other folder", _REFUSED, _differ_in_workdir, (2,)),
    Injury("other number of processes", _REFUSED, _differ_in_number, (2,)),
    Injury("one process missing", _REFUSED, _miss_one, (2,)),
    Injury("one process late", "waited", _start_late, (2,)),
    Injury("one process killed", "exited, and resumed from the last checkpoint", _kill_one, (2,)),
)


def injuries_for(num_processes: int) -> list[Injury]:
    """Returns the injuries for a number of processes, each repeated as often as its share."""
    suitable = [x for x in INJURIES if num_processes in x.processes]
    return list(itertools.chain.from_iterable([x] * x.share for x in suitable))
