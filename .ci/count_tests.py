"""Counts the test cases of runs of Bazel, and prints one line.

Usage: count_tests.py OTHER_FAILURES STATUS:LEAST:LABELS:TESTLOGS ...

OTHER_FAILURES are checks that failed and are no test cases. For each run: the exit status of Bazel,
the least number of cases that must have run, a file with a label on each line, and the folder of
test results. A status that is not 0 although no case failed (a target did not build), and too few
cases, count as a failed case. Exits with 1 if anything failed or nothing ran.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def count(labels: list[str], testlogs: Path) -> dict[str, int]:
    """Returns how many cases of targets passed, failed and were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for label in labels:
        file = testlogs / label.removeprefix("//").replace(":", "/").lstrip("/") / "test.xml"
        try:
            cases = list(ElementTree.parse(file).iter("testcase"))
        except (ElementTree.ParseError, FileNotFoundError):
            # Its process was ended while it wrote, or never began.
            counts["failed"] += 1
            continue
        for case in cases:
            children = {child.tag for child in case}
            failed, skipped = children & {"failure", "error"}, "skipped" in children
            counts["failed" if failed else "skipped" if skipped else "passed"] += 1
    return counts


def main(other_failures: str, *runs: str) -> int:
    """Prints the sum over all runs, and returns the exit status."""
    total = {"passed": 0, "failed": int(other_failures), "skipped": 0}
    for run in runs:
        status, least, labels, testlogs = run.split(":", 3)
        counts = count(Path(labels).read_text().split(), Path(testlogs))
        if sum(counts.values()) < int(least):
            print(f"{testlogs}: expected at least {least} cases: {counts}", file=sys.stderr)
            counts["failed"] += 1
        if int(status) and not counts["failed"]:
            counts["failed"] = 1
        for outcome, number in counts.items():
            total[outcome] += number
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
