"""`python -m benchmarks.warm --share K/N`: compiles what `scripts/gpu_check.py` is going to time.

Compiled kernels stay in the caches of Triton and torch, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import registry, rows, sweep
from benchmarks.gpu_plan import NINE_MINUTES
from benchmarks.operation import Case, Implementation

Unit = tuple[str, Callable[[], object]]


def units(trial: bool) -> list[Unit]:
    """What is compiled, by name: first what takes longest."""
    cases = registry.trial(NINE_MINUTES)[:2] if trial else NINE_MINUTES
    device = "cpu" if trial else "cuda"
    implementations = [(case, each) for case in cases for each in case.implementations if not each.yardstick]
    implementations.sort(key=lambda pair: not pair[1].compiles)
    return [
        *((f"{case.id}/{each.name}", _call(case, each)) for case, each in implementations),
        *(
            (f"{unit.size} {unit.direction} {unit.launch}", lambda unit=unit: unit.prepare(device)())
            for unit in sweep.units(trial)
        ),
    ]


def _call(case: Case, implementation: Implementation) -> Callable[[], None]:
    def call() -> None:
        for size in {case.size, case.operation.checked(case.size)}:
            if implementation.refuse(size, case.device) is None:
                implementation.prepare(size, case.operation.make_inputs(size, case.device))()

    return call


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--share", default="0/1", metavar="K/N", help="every Nth unit of the work, from the Kth"
    )
    parser.add_argument("--out", type=Path, help="file that gets a row for each unit")
    parser.add_argument("--trial", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    for name, call in rows.share(units(options.trial), options.share):
        since = time.monotonic()
        row: rows.Row = {"unit": name}
        try:
            call()
        except Exception as failure:  # is measured, and told, where it is timed
            row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not options.trial:
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        rows.append(options.out, row | {"seconds": round(time.monotonic() - since, 2)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
