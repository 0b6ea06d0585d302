"""The collectives of a compiled program and their mesh axes, parsed from its text.

The text of an XLA program is a list of computations, which are lists of instructions. A `while`
names its body and, for a scan, its trip count, which yields the number of executions of each
collective.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<mesh>[^\]]*)\]"
    r"(?:, device_ids=\((?:\[(?P<shape>[\d,]+)\]T\((?P<order>[\d,]+)\)|(?P<listed>[\d,]+))\))?"
    r" \{(?P<axes>[^}]+)\}"
)
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective of a compiled program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `collective-permute` or `all-to-all`.
        axes: Mesh axes along which devices communicate.
        loops: Trip count of each loop around the collective, from the outermost on.
        num_bytes: Size of the whole arrays that one execution gathers, sums or permutes in one
            group of devices: the size of the output, or of the input if the output is scattered.
        source: Position in the traced program, an XLA `op_name`.
    """

    kind: str
    axes: tuple[str, ...]
    loops: tuple[int, ...]
    num_bytes: int
    source: str

    @property
    def count(self) -> int:
        """Number of executions."""
        return math.prod(self.loops)


def find_collectives(program: str, mesh: Mesh) -> list[Collective]:
    """Finds the collectives of a compiled program.

    Args:
        program: Text of an optimized XLA module, `compiled.as_text()`.
        mesh: Mesh that the program was compiled for.

    Returns:
        The collectives between several devices, in the order of the text.

    Raises:
        ValueError: If a loop around a collective has no known trip count.
    """
    computations = _computations(program)
    loops = _loops_around(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            instruction = _INSTRUCTION.search(line)
            if not instruction or name not in loops:
                continue
            shape, kind, is_start = instruction.groups()
            groups = _groups(line)
            axes = _axes(groups, mesh)
            if not axes:
                continue
            if 0 in loops[name]:
                raise ValueError(f"a {kind} is in a loop without a known trip count: {line}")
            if is_start and kind in ("all-gather", "collective-permute"):
                # The start of an asynchronous one lists operands, results, and perhaps counters.
                sizes = _sizes(shape.replace("u32[]", ""))
                sizes = sizes[len(sizes) // 2 :]
            else:
                sizes = _sizes(shape)
            num_bytes = sum(sizes)
            if kind == "reduce-scatter":
                num_bytes *= len(groups[0])
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(kind, axes, loops[name], num_bytes, source.group(1) if source else "")
            )
    return found


def _computations(program: str) -> dict[str, list[str]]:
    """Returns the lines of every computation; the entry computation is `ENTRY`."""
    computations, lines = {}, []
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(
                "ENTRY" if line.startswith("ENTRY") else head.group(1), []
            )
        elif line.startswith(" "):
            lines.append(line)
    return computations


def _loops_around(computations: dict[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """Returns the trip counts of the loops around each computation, 0 if unknown."""

    def calls(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for line in computations[name]:
            loop = ()
            if " while(" in line:
                trip_count = _TRIP_COUNT.search(line)
                loop = (int(trip_count.group(1)) if trip_count else 0,)
            for called in _CALLED.findall(line):
                yield called, loop
            for branches in _BRANCHES.findall(line):
                yield from ((branch.strip(" %"), loop) for branch in branches.split(","))

    loops, pending = {}, [("ENTRY", ())]
    while pending:
        name, around = pending.pop()
        if name in computations:
            loops[name] = around
            pending += [(called, around + loop) for called, loop in calls(name)]
    return loops


def _sizes(shape: str) -> list[int]:
    """Returns the sizes in bytes of the arrays in a shape."""
    sizes = []
    for dtype, lengths in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
        elements = math.prod(int(length) for length in lengths.split(",") if length)
        sizes.append(elements * bits // 8)
    return sizes


def _groups(line: str) -> list[list[int]]:
    """Returns the groups of devices that communicate; for a permutation, its pairs."""
    listed = _LISTED_GROUPS.search(line)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed.group(1))
        return [[int(device) for device in group.split(",")] for group in groups]
    named = _NAMED_GROUPS.search(line)
    if named:
        return _named_groups(named)
    iota = _IOTA_GROUPS.search(line)
    if iota is None:
        raise ValueError(f"a collective does not list its groups of devices: {line}")
    num_groups, size, shape, order = iota.groups()
    return _devices(shape, order).reshape(int(num_groups), int(size)).tolist()


def _named_groups(match: re.Match) -> list[list[int]]:
    """Returns the groups along mesh axes, or parts of them: `'x':(2)4` is a 4 within each 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["mesh"])}
    if match["shape"]:
        devices = _devices(match["shape"], match["order"]).ravel()
    elif match["listed"]:
        devices = np.array(_numbers(match["listed"]))
    else:
        devices = np.arange(math.prod(sizes.values()))
    coordinates = np.unravel_index(np.arange(devices.size), tuple(sizes.values()))
    shared = dict(zip(sizes, coordinates, strict=True))  # Coordinates common to a group.
    for name, before, size in _AXIS.findall(match["axes"]):
        size = int(size or sizes[name])
        behind = sizes[name] // (int(before or 1) * size)
        shared[name] = shared[name] - shared[name] // behind % size * behind
    _, group = np.unique(np.stack(list(shared.values())), axis=1, return_inverse=True)
    return [devices[group.ravel() == index].tolist() for index in range(group.max() + 1)]


def _devices(shape: str, order: str | None) -> np.ndarray:
    """Returns the ids of all devices, numbered in a shape whose axes are then transposed."""
    devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the members of a group differ.

    Devices are numbered by their position in the mesh.
    """
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
    differs = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        differs |= (coordinates[group] != coordinates[group[0]]).any(axis=0)
    return tuple(name for name, differ in zip(mesh.axis_names, differs, strict=True) if differ)
