"""`python -m benchmarks`: measure, and draw tables and pictures from what was recorded."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import gpu_plan, plot, record, registry, table
from benchmarks.session import Session
from benchmarks.timing import Settings

PARTS = {**registry.PARTS, **gpu_plan.PARTS}
EVERYTHING = ("cpu.json", "cpu_large.json", "cpu_networks.json", "gpu_h100_2026-11-27.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    sizes.add_argument("--large", action="store_true", help="one call each at sizes that take minutes")
    sizes.add_argument("--networks", action="store_true", help="training steps of many networks")
    sizes.add_argument("--part", choices=PARTS, help="a part of the GPU's cases")
    parser.add_argument(
        "--trial", action="store_true", help="with --part: tiny sizes on the CPU, to try the commands"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        default=float("inf"),
        help="with --part: start no case later",
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="regex for CASE/IMPLEMENTATION")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="at most, per case (%(default)s)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="do not attempt what needs more (6 or half of the memory; on a GPU most of what is free)",
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
    if (args.trial or args.budget < float("inf")) and args.part is None:
        parser.error("--trial and --budget go with --part")
    cases, name, device = registry.DEFAULT, "cpu.json", "cpu"
    if args.quick:
        cases, name = registry.QUICK, "quick.json"
    elif args.large:
        cases, name = registry.LARGE, "cpu_large.json"
    elif args.networks:
        cases, name = registry.NETWORKS, "cpu_networks.json"
    elif args.part and args.trial:
        cases, name = registry.trial(PARTS[args.part]), "trial.json"
    elif args.part:
        cases, name, device = PARTS[args.part], f"gpu_{args.part}.json", "cuda"
        if not torch.cuda.is_available() and not args.list:
            parser.error(
                "--part needs a CUDA device, and torch finds none; --trial runs tiny sizes on the CPU"
            )
    if args.only:
        name = "partial.json"  # never in place of a whole record
    limit = _memory_limit(device) if args.memory_limit is None else args.memory_limit * 1e9
    settings = replace(Settings(), rounds=args.rounds, memory_limit=limit)
    if args.networks:
        settings = replace(settings, seconds=60.0)
    elif args.quick or args.part:
        settings = replace(settings, seconds=0.02 if args.trial else 2.0)
    session = Session(cases, args.only, settings, args.out or record.RESULTS / name, device)
    if not session.cases:
        parser.error(f"--only {args.only!r} matches nothing; see --list")
    if args.list:
        print("\n".join(session.selected()))
        return 0
    return session.run_bare(args.budget) if args.part else session.run()


def _memory_limit(device: str) -> float:
    if device == "cuda" and torch.cuda.is_available():
        return 0.85 * torch.cuda.mem_get_info()[0]
    return min(Settings.memory_limit, record.physical_bytes() / 2)


def _load(paths: list[Path]) -> list[record.Record]:
    found = paths or [path for name in EVERYTHING if (path := record.RESULTS / name).exists()]
    if not found:
        raise SystemExit(f"no record in {record.RESULTS}; run `python -m benchmarks` first")
    return [record.load(path) for path in found]


if __name__ == "__main__":
    raise SystemExit(main())
