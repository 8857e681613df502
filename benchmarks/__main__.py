"""`python -m benchmarks`: measure, and draw tables and pictures from what was recorded."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks import plot, record, registry, table
from benchmarks.session import Session
from benchmarks.timing import Settings

EVERYTHING = ("cpu.json", "cpu_large.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    sizes.add_argument("--large", action="store_true", help="one call each at sizes that take minutes")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regex for CASE/IMPLEMENTATION")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="at most, per case (%(default)s)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        default=min(Settings.memory_limit, record.physical_bytes() / 2) / 1e9,
        help="do not attempt what needs more (6, or half of the machine's memory)",
    )
    parser.add_argument("--out", type=Path, help="where to record (benchmarks/results/NAME.json)")
    parser.add_argument("--list", action="store_true", help="list what would be measured")
    for name, what in (
        ("--table", "print tables as markdown"),
        ("--plot", "draw pictures beside the record"),
    ):
        parser.add_argument(
            name, nargs="*", type=Path, metavar="RECORD", help=f"{what}, without measuring anything"
        )
    args = parser.parse_args()

    if args.table is not None or args.plot is not None:
        if args.table is not None:
            print(table.markdown(_load(args.table)))
        if args.plot is not None:
            folder = args.plot[0].parent if args.plot else record.RESULTS
            for path in plot.draw(_load(args.plot), folder):
                print(path)
        return 0

    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    cases, name = registry.DEFAULT, "cpu.json"
    if args.quick:
        cases, name = registry.QUICK, "quick.json"
    elif args.large:
        cases, name = registry.LARGE, "cpu_large.json"
    if args.only:
        name = "partial.json"  # never in place of a whole record
    settings = replace(Settings(), rounds=args.rounds, memory_limit=args.memory_limit * 1e9)
    if args.quick:
        settings = replace(settings, seconds=2.0)
    session = Session(cases, args.only, settings, args.out or record.RESULTS / name)
    if not session.cases:
        parser.error(f"--only {args.only!r} matches nothing; see --list")
    if args.list:
        print("\n".join(session.selected()))
        return 0
    return session.run()


def _load(paths: list[Path]) -> list[record.Record]:
    found = paths or [path for name in EVERYTHING if (path := record.RESULTS / name).exists()]
    if not found:
        raise SystemExit(f"no record in {record.RESULTS}; run `python -m benchmarks` first")
    return [record.load(path) for path in found]


if __name__ == "__main__":
    raise SystemExit(main())
