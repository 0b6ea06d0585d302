"""Compares the `deps` of every Python target with what its sources import.

Usage: check_deps.py [--fix]

Prints each label that is missing or unused, and each file that its BUILD file does not name, and
exits with 1 if there are any; `--fix` corrects the labels. A label whose line ends with
`# keep: REASON` may be unused. A target without sources stands for its `deps`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RULES = {"py_library", "py_binary", "xlstm_test"}
# Distributions whose names differ from their modules.
DISTRIBUTIONS = {"absl": "absl_py", "orbax": "orbax_checkpoint", "yaml": "pyyaml"}
# What a rule adds to `deps` itself.
IMPLIED_DEPS = {"xlstm_test": {"@pip//:pytest", "//xlstm/testing:quick_compilation"}}


def build_files() -> list[Path]:
    """Returns the BUILD files of the packages that hold our code."""
    folders = ("docs", "examples/clusters", "wheel", "xlstm")
    return sorted(path for folder in folders for path in Path(folder).rglob("BUILD"))


class Target(NamedTuple):
    """A target of a BUILD file; `deps` is its list there, if it has one."""

    rule: str
    label: str
    srcs: list[str]
    deps: ast.List | None


def targets(build: Path) -> Iterator[Target]:
    """Yields the Python targets of a BUILD file; variables are replaced by their values."""
    variables = {}
    for node in ast.parse(build.read_text()).body:
        if isinstance(node, ast.Assign):
            variables[node.targets[0].id] = node.value
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in RULES:
            values = {keyword.arg: keyword.value for keyword in call.keywords}
            deps = values.get("deps")
            deps = variables[deps.id] if isinstance(deps, ast.Name) else deps
            label = f"//{build.parent}:{values['name'].value}"
            yield Target(call.func.id, label, strings(values.get("srcs")), deps)


def strings(value: ast.expr | None) -> list[str]:
    """Returns the strings of a list, or none."""
    return [element.value for element in getattr(value, "elts", [])]


def imports(source: Path) -> Iterator[str]:
    """Yields the dotted name of every module that a file may import, and of names in it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def needed(build: Path, srcs: list[str], owners: dict[Path, str]) -> set[str]:
    """Returns the absolute labels of all that sources import."""
    labels, siblings = set(), {Path(src).stem for src in srcs}
    for name in (name for src in srcs for name in imports(build.parent / src)):
        top = name.partition(".")[0]
        if top in ("examples", "xlstm"):
            labels.add(owners.get(Path(name.replace(".", "/") + ".py")))
        elif top not in sys.stdlib_module_names and top not in siblings:
            labels.add(f"@pip//:{DISTRIBUTIONS.get(top, top.lower())}")
    return labels - {None}


def expand(label: str, aggregates: dict[str, list[str]]) -> set[str]:
    """Returns a label itself, or the targets in its aggregate."""
    if label not in aggregates:
        return {label}
    return {x for inner in aggregates[label] for x in expand(inner, aggregates)}


def absolute(label: str, package: str) -> str:
    """Returns a label in the form `//package:name`."""
    if label.startswith(":"):
        return f"//{package}{label}"
    if label.startswith("//") and ":" not in label:
        return f"{label}:{label.rpartition('/')[2]}"
    return label


def relative(label: str, package: str) -> str:
    """Returns a label in its shortest form, as it is written in a package."""
    if label.startswith(f"//{package}:"):
        return label.removeprefix(f"//{package}")
    folder, _, name = label.partition(":")
    return folder if folder.startswith("//") and folder.endswith(f"/{name}") else label


def format_labels(labels: set[str], package: str, reasons: dict[str, str]) -> str:
    """Returns a list of labels as buildifier would have it."""
    texts = sorted(
        (relative(label, package) for label in labels),
        key=lambda text: (text.startswith("@"), not text.startswith(":"), text.replace(":", "!")),
    )
    if len(texts) == 1 and not reasons:
        return f'["{texts[0]}"]'
    lines = (f'        "{text}",{reasons.get(absolute(text, package), "")}' for text in texts)
    return "\n".join(["[", *lines, "    ]"])


def check(
    target: Target, wanted: set[str], aggregates: dict[str, list[str]], lines: list[str]
) -> str | None:
    """Prints what is wrong with the dependencies of a target.

    Args:
        target: The target.
        wanted: The labels that its sources need.
        aggregates: The dependencies of each target without sources.
        lines: The lines of the BUILD file.

    Returns:
        The corrected list; None if it is right.
    """
    package = target.label[2:].partition(":")[0]
    given, reasons = set(), {}
    for element in getattr(target.deps, "elts", []):
        label = absolute(element.value, package)
        given.add(label)
        _, keep, reason = lines[element.lineno - 1].partition("# keep: ")
        if keep:
            reasons[label] = f"  {keep}{reason}"
    contents = {label: expand(label, aggregates) for label in given}
    missing = wanted.difference(*contents.values())
    unused = {label for label in given - reasons.keys() if not contents[label] & wanted}
    for label in sorted(missing):
        print(f"{target.label}: {relative(label, package)} is missing")
    for label in sorted(unused):
        print(f"{target.label}: {relative(label, package)} is unused")
    return format_labels((given | missing) - unused, package, reasons) if missing | unused else None


def main(argv: list[str]) -> int:
    """Checks or corrects every BUILD file, and returns the exit status."""
    packages = {build: list(targets(build)) for build in build_files()}
    sources = {
        build.parent / src: target
        for build, found in packages.items()
        for target in found
        for src in target.srcs
    }
    owners = {path: t.label for path, t in sources.items() if t.rule != "xlstm_test"}
    aggregates = {
        target.label: [absolute(label, str(build.parent)) for label in strings(target.deps)]
        for build, found in packages.items()
        for target in found
        if target.rule == "py_library" and not target.srcs
    }
    texts = {build: build.read_text() for build in packages}
    forgotten = sorted(
        path
        for build, found in packages.items()
        for path in build.parent.glob("*.py")
        if found and f'"{path.name}"' not in texts[build]
    )
    for path in forgotten:
        print(f"{path} is not in its BUILD file")
    is_right = not forgotten
    for build, found in packages.items():
        lines, edits = texts[build].split("\n"), {}
        for target in found:
            if target.label in aggregates:
                continue  # Its dependencies are its content.
            wanted = needed(build, target.srcs, owners) - IMPLIED_DEPS.get(target.rule, set())
            right = check(target, wanted - {target.label}, aggregates, lines)
            deps = target.deps
            is_right &= right is None or "--fix" in argv and deps is not None
            if right and deps is None:
                print(f"{target.label}: add `deps = []` for --fix to fill")
            elif right:
                span = deps.lineno, deps.col_offset, deps.end_lineno, deps.end_col_offset
                edits[span] = right
        if "--fix" in argv:
            for (first, begin, last, end), text in sorted(edits.items(), reverse=True):
                lines[first - 1 : last] = (
                    lines[first - 1][:begin] + text + lines[last - 1][end:]
                ).split("\n")
            build.write_text("\n".join(lines))
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
