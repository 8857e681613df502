"""`python -m benchmarks.against TREE`: this tree's times beside those of another checkout, measured in turn.

TREE is a folder with another version of this repository, its extension built in place. Only `ours` is timed,
in the CPU cases that both trees know. The trees take turns, each time in a fresh process with this Python. A
ratio is that of the medians over all turns: above 1, this tree is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import record, registry
from benchmarks.operation import Case

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1.0  # for each case of a turn
LEAST_CALLS = 3

# Runs within each tree, with that tree's package and cases.
_TURN = """
import json, sys, time
from statistics import median
from benchmarks import registry
from benchmarks.operation import OURS
cases = {case.id: case for case in (*registry.DEFAULT, *registry.QUICK)}
seconds, least, *wanted = sys.argv[1:]
for case_id in filter(cases.__contains__, wanted):
    case = cases[case_id]
    run = case.operation.implementation(OURS).prepare(case.size, case.operation.make_inputs(case.size, "cpu"))
    run()
    times, began = [], time.perf_counter()
    while len(times) < int(least) or time.perf_counter() - began < float(seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(json.dumps([case_id, median(times)]), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regex for the cases' names")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each tree (%(default)s)")
    parser.add_argument("--out", type=Path, help="where to record")
    args = parser.parse_args()
    cases = [case for case in registry.DEFAULT if re.search(args.only, case.id)]
    found = measure(args.tree.resolve(), cases, args.rounds)
    print(table(found))
    if args.out is not None:
        command = shlex.join(["python", "-m", "benchmarks.against", *sys.argv[1:]])
        record.save(describe(command, args.tree, found), args.out)
    return 0


def measure(
    tree: Path, cases: list[Case], rounds: int, seconds: float = SECONDS
) -> dict[str, dict[str, list[float]]]:
    """Medians of every turn in seconds, by case and then `"before"` (the other tree) or `"after"`."""
    trees = {"before": tree, "after": ROOT}
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        for name in sorted(trees, reverse=turn % 2 == 0):  # whoever was second is first the next time
            for case_id, time in _turn(trees[name], [case.id for case in cases], seconds):
                found.setdefault(case_id, {"before": [], "after": []})[name].append(time)
    return {case_id: times for case_id, times in found.items() if all(times.values())}


def _turn(tree: Path, case_ids: list[str], seconds: float) -> list[tuple[str, float]]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", _TURN, str(seconds), str(LEAST_CALLS), *case_ids]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{tree}: {done.stderr.strip().splitlines()[-1]}")
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def ratio(times: dict[str, list[float]]) -> float:
    """This tree's median over the other's."""
    return median(times["after"]) / median(times["before"])


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The times and their ratio as markdown."""
    lines = ["| case | before, ms | after, ms | after / before |", "|---|---|---|---|"]
    for case_id, times in found.items():
        before, after = (f"{1e3 * median(times[name]):.3g}" for name in ("before", "after"))
        lines.append(f"| {case_id} | {before} | {after} | {ratio(times):.2f} |")
    return "\n".join(lines)


def describe(command: str, tree: Path, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """What is recorded."""

    def commit(folder: Path) -> str:
        git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"

    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commits": {"before": commit(tree), "after": commit(ROOT)},
        "machine": {
            "cpu": record.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_code": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": [
            {"id": case_id, "seconds": times, "ratio": ratio(times)} for case_id, times in found.items()
        ],
    }


if __name__ == "__main__":
    raise SystemExit(main())
