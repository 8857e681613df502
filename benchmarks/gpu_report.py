"""What the parts of `scripts/gpu_check.py` left in their folder, and how the terminal shows it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import accuracy, rows, sweep, table
from benchmarks.operation import OURS

Result = dict[str, Any]

_CLOSEST = 15  # errors nearest to what is allowed
_FAILURES = 12  # shown
_WIDTH = 210  # of a line
_COUNTERS = (
    *("Duration", "Registers Per Thread", "Achieved Occupancy", "Compute (SM) Throughput"),
    *("DRAM Throughput", "Executed Ipc Active"),
)


def result(part: str, folder: Path) -> Result:
    """What a part has left so far; empty where that is nothing.

    Raises:
        ValueError: a file does not hold what it should.
    """
    match part:
        case "build" | "timings" | "large":
            file = folder / f"{part}.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            return {
                key: found[key] for key in ("how", "missing", "record", "ceilings", "cases") if key in found
            }
        case "warm":
            units = rows.read(folder / "warm.jsonl")
            failed = {row["unit"]: row["failed"] for row in units if "failed" in row}
            return {"units": len(units), "seconds": sum(row["seconds"] for row in units), "failed": failed}
        case "right" | "right-large":
            return _tests(rows.read(folder / f"{part}.jsonl"))
        case "sweep":
            launches = rows.read(folder / "sweep.jsonl")
            return {"best": sweep.best(launches), "launches": launches}
        case "counters":
            return {"kernels": counters(folder / "counters.csv")}
        case "accuracy":
            runs = rows.read(folder / "accuracy.jsonl")
            return {"summary": accuracy.summarise(runs), "runs": runs}
        case _:
            return {"found": _sanitized(folder)}


def _tests(outcomes: list[rows.Row]) -> Result:
    """Counts; every failure with its message; the errors that come nearest to what is allowed."""
    errors = [
        {"test": row["test"], "of": name, "error": error, "plain": plain, "allowed": allowed}
        for row in outcomes
        for name, error, plain, allowed in row.get("errors", ())
    ]
    errors.sort(key=lambda each: -each["error"] / each["allowed"])
    return {
        "passed": sum(row["outcome"] == "passed" for row in outcomes),
        "failed": [
            {"test": row["test"], "message": row["message"]} for row in outcomes if row["outcome"] == "failed"
        ],
        "skipped": dict(Counter(row.get("message", "") for row in outcomes if row["outcome"] == "skipped")),
        "compared": len(errors),
        "closest": errors[:_CLOSEST],
    }


def counters(file: Path) -> list[Result]:
    """Each kernel that ncu measured, and its metrics with their units, from its output as CSV."""
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines() if line.startswith('"')]
    kernels: dict[str, Result] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"], "metrics": {}})
            kernel["metrics"][row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def _sanitized(folder: Path) -> dict[str, list[str]]:
    """What the sanitizer's tools say, by log: summaries, and the errors before them."""
    return {
        log.stem: [line for line in log.read_text(errors="replace").splitlines() if line.startswith("====")][
            -40:
        ]
        for log in sorted(folder.glob("sanitizer*.log"))
    }


def lines(part: str, found: Result) -> list[str]:
    """A part's result in words: the first line in short, then what deserves a line of its own."""
    match part:
        case "build":
            missing = [f"{name} cannot run: {reason}" for name, reason in found["missing"].items()]
            return ["; ".join([f"libraries {found['how']}", *missing])]
        case "warm":
            failed = [f"{unit}: {reason}" for unit, reason in found["failed"].items()]
            return [f"{found['units']} compiled or run, {len(failed)} failed", *failed[:_FAILURES]]
        case "right" | "right-large":
            return _test_lines(found)
        case "timings" | "large":
            return _timing_lines(found.get("cases", []))
        case "sweep":
            return [f"{len(found['launches'])} launches", *map(_sweep_line, found["best"])]
        case "counters":
            return [f"{len(found['kernels'])} kernels", *map(_counter_line, found["kernels"])]
        case "accuracy":
            return [f"{len(found['runs'])} runs", *_accuracy_lines(found["summary"])]
        case _:
            said = [
                f"{log}: {line}" for log, each in found["found"].items() for line in each if "SUMMARY" in line
            ]
            return [f"{len(said)} summaries", *said]


def _test_lines(found: Result) -> list[str]:
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in found["skipped"].items())
    said = [f"{found['passed']} passed, {len(found['failed'])} failed{skipped}"]
    if found["closest"]:
        nearest = found["closest"][0]
        of = f"{nearest['error']:.2g} of {nearest['allowed']:.2g} allowed, plain {nearest['plain']:.2g}"
        said.append(
            f"{found['compared']} errors compared; the nearest: {nearest['of']}, {of}, {nearest['test']}"
        )
    said += [f"{each['test']}: {' '.join(each['message'].split())}" for each in found["failed"][:_FAILURES]]
    return said


def _timing_lines(cases: list[Result]) -> list[str]:
    measured = [case for case in cases if "seconds" in case["implementations"].get(OURS, {})]
    said = [f"{len(measured)} of {len(cases)} cases measured; microseconds"]
    for case in cases:
        times = [f"{name} {_time(entry)}" for name, entry in case["implementations"].items()]
        said.append(f"{case['id'].removesuffix(',graph')}: {', '.join(times)}")
    return said


def _time(entry: Result) -> str:
    """Microseconds on the device; in brackets of the host, and launches, of a call that is not captured."""
    if "seconds" not in entry:
        return f"{entry['status']} ({entry['reason'][:60]})"
    beside = [f"{1e6 * entry[key]:.0f} host" for key in ("uncaptured_host_seconds",) if key in entry]
    beside += [f"{entry[key]} {key}" for key in ("launches",) if key in entry]
    return f"{1e6 * median(entry['seconds']):.4g}" + (f" ({', '.join(beside)})" if beside else "")


def _sweep_line(best: Result) -> str:
    tables = "failed" if best["tables"] is None else f"{1e6 * best['tables']:.4g}"
    launch = "the tables' launch" if best["launch"] is None else best["launch"]
    fastest = f"{1e6 * best['seconds']:.4g} us by {launch}"
    return f"{best['size']} {best['direction']}: {fastest}, by the tables {tables}"


def _counter_line(kernel: Result) -> str:
    shown = [f"{name} {kernel['metrics'][name]}" for name in _COUNTERS if name in kernel["metrics"]]
    return f"{kernel['name'][:40]}: {', '.join(shown)}"


def _accuracy_lines(summary: Result) -> list[str]:
    said = []
    for arm, each in summary.items():
        line = f"{arm}: Dice {100 * each['dice']:.1f} over {each['runs']} runs"
        if (difference := each.get("difference")) is not None:
            line += f", {100 * difference['mean']:+.2f} to the baseline over {difference['n']} pairs"
            if difference["low"] is not None:
                line += f" ({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f})"
        said.append(line)
    return said


def closing(parts: dict[str, Result]) -> str:
    """The table that ends a check: a line a part, what came out of it below, then the targets."""
    names, outcomes = (max(map(len, each)) for each in (parts, [part["outcome"] for part in parts.values()]))
    said = []
    for name, part in parts.items():
        first, *others = part.get("lines") or [""]
        words = "; ".join(filter(None, (part.get("reason"), part.get("unread"), first)))
        seconds = f"{part['seconds']:5.0f} s"
        said.append(f"{name:<{names}}  {part['outcome']:<{outcomes}}  {seconds}  {words}".rstrip())
        said += [f"    {line}" for line in others]
    cases = [case for part in parts.values() for case in part.get("result", {}).get("cases", [])]
    return "\n".join([*(line[:_WIDTH] for line in said), table.targets_table(cases)]).rstrip()
