"""Fuzzes the tools with changed input files.

    bazel run //xlstm/tools:fuzz -- --cases=200

A small Hugging Face model is imported as a run, text is generated with it, and a token store is
made with its tokenizer. Each case changes one file in a copy of these and runs a tool on it. If the
file still means the same, the tool must accept it and give the same result. Other input that it
accepts must be read as the files say. All other input must be rejected in one sentence, without
leaving files behind, in bounded time and memory. Some cases are repeated as commands, which must
exit with status 2 when they reject the input.
"""

import collections
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file

from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.huggingface.convert import import_model
from xlstm.huggingface.layout import hf_tensors, parameter_shapes, to_hf_config
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.tools.command_line import run
from xlstm.tools.testing import mutations
from xlstm.tools.testing.tool_worker import ACCEPTED, FAILED, REJECTED, Answer, Worker
from xlstm.trainer.checkpoints.checksums import write_checksums

_CASES = flags.DEFINE_integer("cases", 200, "Number of changed inputs.", lower_bound=1)
_COMMANDS = flags.DEFINE_integer("commands", 20, "Number of cases to repeat as commands.")
_SEED = flags.DEFINE_integer("fuzz_seed", 0, "Seed of the changes.")

_SECONDS, _BYTES = 10, 2 * 10**9
_CONVERT, _GENERATE, _EVALUATE = (
    f"xlstm.tools.{name}" for name in ("convert", "generate", "evaluate")
)
_MODEL = ModelConfig(vocab_size=300, embedding_dim=16, num_blocks=2, num_heads=2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        tool: The module of the tool that reads it.
        words: The tool's command line; `@` stands for the case's folder.
        source: The folder among the inputs that is copied.
        files: The files in that folder that may be changed.
        change: Changes the content of a file.
    """

    tool: str
    words: tuple[str, ...]
    source: str
    files: tuple[str, ...]
    change: Callable[[random.Random, bytes], tuple[bytes, str, bool]] = mutations.mutate_json


_IMPORT = ("--from_hf=@/model", "--to=@/out")
_EXPORT = ("--from=@/run", "--to_hf=@/out")
_WRITE = ("--checkpoint=@/run", "--output_ids", "--temperature=0", "--num_tokens=3")
_WRITE_ON = (*_WRITE, "--load_state=@/run/state")
_JUDGE = ("--checkpoint=@/run", "--data=x=@/store", "--max_batches=2", "--json=@/out")
_STEP = "checkpoints/0"
KINDS = {
    "config of a model": Kind(_CONVERT, _IMPORT, "model", ("config.json",)),
    "header": Kind(
        _CONVERT, _IMPORT, "model", ("a.safetensors", "b.safetensors"), mutations.mutate_header
    ),
    "index": Kind(_CONVERT, _IMPORT, "model", ("model.safetensors.index.json",)),
    "tokenizer": Kind(
        _CONVERT,
        _IMPORT,
        "model",
        ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    ),
    "config of a run": Kind(_GENERATE, (*_WRITE, "--prompt_ids=1,2"), "run", ("config.json",)),
    "saved state": Kind(_GENERATE, _WRITE_ON, "run", ("state",)),
    "checkpoint": Kind(
        _CONVERT,
        _EXPORT,
        "run",
        (f"{_STEP}/run_info.json", f"{_STEP}/state/_METADATA", f"{_STEP}/checksums.json", _STEP),
    ),
    "config, evaluated": Kind(_EVALUATE, _JUDGE, "run", ("config.json",)),
    "token store": Kind(
        _EVALUATE, (*_JUDGE, "--context_length=16", "--batch_size=2"), "store", ("meta.json",)
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A changed input.

    Attributes:
        kind: The kind's name in `KINDS`.
        folder: The case's folder.
        what: A description of the change.
        is_same: Whether the input still means the same.
        is_wrong: Whether the input must be rejected, whatever it means.
        changes_numbers: Whether the numbers in it may differ.
    """

    kind: str
    folder: str
    what: str
    is_same: bool = False
    is_wrong: bool = False
    changes_numbers: bool = False

    @property
    def words(self) -> list[str]:
        """Returns the command line of the case's tool."""
        return [word.replace("@", self.folder) for word in KINDS[self.kind].words]


class Fuzz:
    """Input files, changed copies of them, and the checks of what the tools do with these."""

    def __init__(self, folder: str, rng: random.Random):
        """Makes the inputs.

        Args:
            folder: An empty folder.
            rng: Chooses the changes.
        """
        self._folder, self._rng = folder, rng
        self._inputs = os.path.join(folder, "inputs")
        self._env = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._workers: dict[str, Worker] = {}
        self._expected: dict[str, object] = {}
        self._number = 0
        self._make_inputs()

    def _make_inputs(self) -> None:
        model = os.path.join(self._inputs, "model")
        os.makedirs(model)
        rng = np.random.default_rng(self._rng.getrandbits(32))
        tensors = hf_tensors(parameter_shapes(_MODEL))
        arrays = {x.name: rng.standard_normal(x.shape, dtype=np.float32) for x in tensors}
        names = sorted(arrays)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        for file, part in parts.items():
            save_file({name: arrays[name] for name in part}, os.path.join(model, file))
        config = to_hf_config(_MODEL, BackendConfig(chunk_size=8), "float32")
        for name, content in {
            "config.json": config | {"eos_token_id": 0},
            "model.safetensors.index.json": {"weight_map": weight_map},
            "generation_config.json": {"eos_token_id": [0], "temperature": 0.5},
            "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        }.items():
            with open(os.path.join(model, name), "w", encoding="utf-8") as file:
                json.dump(content, file)
        path = write_tokenizer_json(os.path.join(model, "tokenizer.json"), words=["one", "two"])
        store = os.path.join(self._inputs, "store")
        write_store(store, ["one two " * 20] * 200, load_tokenizer(path))
        run_folder = os.path.join(self._inputs, "run")
        import_model(model, run_folder, lambda done, total: None)
        words = [word.replace("@", self._inputs) for word in _WRITE]
        state = os.path.join(run_folder, "state")
        self._command(_GENERATE, [*words, "--prompt_ids=1,2", f"--save_state={state}"], check=True)

    def _command(self, tool: str, words: list[str], check: bool) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", tool, *words],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | self._env,
            check=check,
            timeout=300,
        )

    def make_case(self, kind: str, *, unchanged: bool = False) -> Case:
        """Copies an input and changes it."""
        folder = os.path.join(self._folder, f"{self._number:04d}")
        self._number += 1
        source = KINDS[kind].source
        for name in {source, *({"run", "store"} if KINDS[kind].tool == _EVALUATE else ())}:
            shutil.copytree(os.path.join(self._inputs, name), os.path.join(folder, name))
        if unchanged:
            return Case(kind, folder, "nothing", is_same=True)
        file = self._rng.choice(KINDS[kind].files)
        path = os.path.join(folder, source, file)
        if kind == "saved state":
            return self._change_state(folder, path)
        if os.path.isdir(path):
            return self._change_part(folder, path)
        if self._rng.random() < 0.15:
            return self._put_behind_link(kind, folder, path)
        with open(path, "rb") as opened:
            content = opened.read()
        changed, what, is_same = KINDS[kind].change(self._rng, content)
        with open(path, "wb") as opened:
            opened.write(changed)
        case = Case(kind, folder, f"{file}: {what}", is_same)
        if kind != "checkpoint" or file.endswith("checksums.json"):
            # The checksums have a checksum themselves, and only one valid form.
            is_wrong = file.endswith("checksums.json") and changed != content
            return dataclasses.replace(case, is_same=is_same and not is_wrong, is_wrong=is_wrong)
        if self._rng.random() < 0.8:
            write_checksums(os.path.join(folder, source, _STEP))
            return case
        what = f"{case.what}, not its checksum"
        is_wrong = changed != content
        return dataclasses.replace(case, what=what, is_same=not is_wrong, is_wrong=is_wrong)

    def _change_state(self, folder: str, path: str) -> Case:
        if self._rng.random() < 0.6:
            what, is_same = mutations.mutate_arrays(self._rng, path)
            return Case("saved state", folder, what, is_same)
        operation = self._rng.choice(["cut", "flip"])
        with open(path, "rb") as file:
            content, what = mutations.mutate_bytes(self._rng, file.read(), operation)
        with open(path, "wb") as file:
            file.write(content)
        return Case("saved state", folder, what)

    def _change_part(self, folder: str, step_folder: str) -> Case:
        """Changes a file of the arrays, and its checksum with it."""
        state = os.path.join(step_folder, "state")
        path = self._rng.choice(
            sorted(os.path.join(root, name) for root, _, names in os.walk(state) for name in names)
        )
        name, operation = os.path.relpath(path, step_folder), self._rng.choice(["cut", "flip"])
        with open(path, "rb") as file:
            content, what = mutations.mutate_bytes(self._rng, file.read(), operation)
        with open(path, "wb") as file:
            file.write(content)
        write_checksums(step_folder)
        is_flip = operation == "flip"
        return Case("checkpoint", folder, f"{name}: {what}", changes_numbers=is_flip)

    def _put_behind_link(self, kind: str, folder: str, path: str) -> Case:
        name, is_outside = os.path.basename(path), self._rng.random() < 0.5
        where = folder if is_outside else os.path.dirname(path)
        mutations.move_behind_link(path, os.path.join(where, "elsewhere", name))
        what = f"{name} is a link {'out of' if is_outside else 'into'} the folder"
        return Case(kind, folder, what, is_same=not is_outside, is_wrong=is_outside)

    def run(self, case: Case) -> tuple[Answer, str | None]:
        """Runs a case's tool.

        Returns:
            The tool's answer, and what is wrong with it, or None.
        """
        if case.kind not in self._expected:
            self._expected[case.kind] = None
            plain = self.make_case(case.kind, unchanged=True)
            answer = self._worker(plain).run(plain.words, 30 * _SECONDS)
            _check(answer.ending == ACCEPTED, f"{case.kind}, unchanged: {answer.text}")
            self._expected[case.kind] = self._result(plain, answer)
        before = dict(_files(case.folder))
        answer = self._worker(case).run(case.words, 2 * _SECONDS)
        if answer.ending == FAILED:
            self._workers.pop(KINDS[case.kind].tool).close()
        return answer, self._find_fault(case, answer, before)

    def _worker(self, case: Case) -> Worker:
        tool = KINDS[case.kind].tool
        if tool not in self._workers:
            self._workers[tool] = Worker(tool, self._env, _BYTES)
        return self._workers[tool]

    def _find_fault(self, case: Case, answer: Answer, before: dict[str, tuple]) -> str | None:
        if answer.ending == FAILED:
            return answer.text
        if answer.seconds > _SECONDS or answer.num_bytes > _BYTES:
            return f"it took {answer.seconds:.1f} s and {answer.num_bytes:,} bytes"
        if answer.ending == REJECTED:
            if case.is_same:
                return f"it is rejected: {answer.text}"
            if not 0 < len(answer.text) < 2000:
                return f"a message of {len(answer.text):,} characters: {answer.text[:200]}"
            return None if dict(_files(case.folder)) == before else "something was left behind"
        if case.is_wrong:
            return "it is accepted"
        try:
            result = self._result(case, answer)
        except (ValueError, OSError, AssertionError) as error:
            return f"what was made of it cannot be used: {error}"
        if case.is_same and not _same(result, self._expected[case.kind]):
            return "it is taken for something else"
        return None

    def _result(self, case: Case, answer: Answer) -> object:
        """Returns the tool's result; raises an error if it does not match the input."""
        output = os.path.join(case.folder, "out")
        if case.kind in ("config of a run", "saved state"):
            ids = [int(word) for word in answer.text.split()]
            _check(all(0 <= i < _MODEL.vocab_size for i in ids), f"ids {ids}")
            is_same = self._expected[case.kind] in (None, ids)
            _check(is_same or case.kind != "saved state", "it continues in another way")
            return ids
        if KINDS[case.kind].tool == _EVALUATE:
            with open(output, encoding="utf-8") as file:
                figures = json.load(file)
            _check(all(map(math.isfinite, figures.values())), f"figures {figures}")
            return figures
        if case.kind == "checkpoint":
            arrays = _read_model(output)
            expected = self._expected[case.kind]
            is_same = expected is None or _same(arrays, expected)
            _check(case.changes_numbers or is_same, "other numbers")
            return arrays
        # The imported model must hold what another reader finds in the files.
        back = os.path.join(case.folder, "back")
        worker = self._worker(case)
        answer = worker.run([f"--from={output}", f"--to_hf={back}"], 3 * _SECONDS)
        _check(answer.ending == ACCEPTED, answer.text)
        arrays = _read_model(back)
        is_same = _same(arrays, _read_model(os.path.join(case.folder, "model")))
        _check(is_same, "other numbers")
        return arrays

    def run_command(self, case: Case, answer: Answer) -> str | None:
        """Repeats a case as a command; returns what is wrong with its answer, or None."""
        for name in ("out", "back"):
            path = os.path.join(case.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)
        before = dict(_files(case.folder))
        process = self._command(KINDS[case.kind].tool, case.words, check=False)
        status = 2 if answer.ending == REJECTED else 0
        if process.returncode != status:
            return f"the command's status is {process.returncode}: {process.stderr}"
        if status == 0:
            return None
        is_line = process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
        if not is_line or not process.stderr[:-1].isprintable():
            return f"the command's answer is not one line: {process.stderr!r}"
        return None if dict(_files(case.folder)) == before else "the command left something behind"

    def close(self) -> None:
        """Kills the worker processes."""
        for worker in self._workers.values():
            worker.close()


def _check(condition: bool, message: str) -> None:
    """Raises AssertionError, even where Python drops assert statements."""
    if not condition:
        raise AssertionError(message)


def _files(folder: str) -> Iterator[tuple[str, tuple]]:
    """Yields every file and folder in a folder, with what a write changes of it."""
    for root, folders, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in (*folders, *names)):
            status = os.lstat(path)
            yield path, (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)


def _read_model(folder: str) -> dict[str, np.ndarray]:
    """Returns all tensors of a Hugging Face model, read by the safetensors library."""
    arrays = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            arrays |= load_file(os.path.join(folder, name))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    return one == other


def _table(answers: list[tuple[Case, Answer]]) -> Table:
    table = Table(box=None)
    for column in ("input", "cases", "accepted", "rejected", "slowest (s)", "memory (MB)"):
        table.add_column(column, justify="left" if column == "input" else "right")
    for kind in KINDS:
        found = [answer for case, answer in answers if case.kind == kind]
        if found:
            endings = collections.Counter(answer.ending for answer in found)
            table.add_row(
                kind,
                *(str(x) for x in (len(found), endings[ACCEPTED], endings[REJECTED])),
                f"{max(answer.seconds for answer in found):.1f}",
                f"{max(answer.num_bytes for answer in found) / 1e6:,.0f}",
            )
    return table


def main(argv: list[str]) -> None:
    """Fuzzes the tools as the flags say, and prints the results."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    folder = tempfile.mkdtemp(prefix="fuzz-")
    rng, console = random.Random(_SEED.value), Console(highlight=False, markup=False, emoji=False)
    fuzz = Fuzz(folder, rng)
    answers, faults = [], []
    for number in track(range(_CASES.value), "cases", console=Console(stderr=True)):
        case = fuzz.make_case(list(KINDS)[number % len(KINDS)])
        answer, fault = fuzz.run(case)
        answers.append((case, answer))
        if fault:
            faults.append((case, fault))
            continue
        if number % max(_CASES.value // max(_COMMANDS.value, 1), 1) == 0 and _COMMANDS.value:
            fault = fuzz.run_command(case, answer)
            faults += [(case, fault)] if fault else []
        if not fault:
            shutil.rmtree(case.folder)
    fuzz.close()
    console.print(_table(answers))
    for case, fault in faults:
        console.print(f"{case.kind}: {case.what} ({case.folder}): {fault}", soft_wrap=True)
    if faults:
        raise ValueError(f"{len(faults)} of {len(answers)} cases failed: see {folder}")
    shutil.rmtree(folder)
    console.print("every case was accepted correctly, or rejected in one line with nothing left")


if __name__ == "__main__":
    run(main)
