"""Counts the test cases in the folders of test results that Bazel leaves, and prints one line.

Usage: count_tests.py OTHER_FAILURES STATUS:FOLDER ...

OTHER_FAILURES are checks that failed and are no test cases. STATUS is the exit status of Bazel: one
that is not 0 although no case in FOLDER failed (a target did not build) counts as a failed case.
Exits with 1 if anything failed or nothing ran.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def count(folder: Path) -> dict[str, int]:
    """Returns how many cases passed, failed and were skipped in every `test.xml` of a folder."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for file in sorted(folder.glob("**/test.xml")):
        try:
            cases = list(ElementTree.parse(file).iter("testcase"))
        except ElementTree.ParseError:
            # Its process was ended while it wrote.
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
        status, folder = run.split(":", 1)
        counts = count(Path(folder))
        if int(status) and not counts["failed"]:
            counts["failed"] = 1
        for outcome, number in counts.items():
            total[outcome] += number
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
