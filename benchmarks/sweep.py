"""The two kernels of PDCR under many launches: `python -m benchmarks.sweep --out ROWS.jsonl`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import device as device_timing
from benchmarks import pdcr, rows
from benchmarks.gpu_plan import SWEEP
from benchmarks.operation import OURS, Result, Run
from benchmarks.timing import normwise_error

# For both directions, own rows x streamed rows x warps x stages; None is what the tables choose. With True,
# by the kernels for sm_90 whose products overlap with other instructions (kernels/pdcr/hopper.py).
LAUNCHES: dict[str, tuple[tuple[int, ...] | None, ...]] = {
    "forward": (
        None,
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
    ),
    "backward": (
        None,
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 3, True),
        (128, 32, 8, 3, True),
    ),
}


class Unit(NamedTuple):
    """One launch of one kernel at one size."""

    size: pdcr.Size
    direction: str
    launch: tuple[int, ...] | None

    def prepare(self, device: str) -> Run:
        """The forward pass alone, or both passes, of which only the backward kernel's launch is changed."""
        name = "forward alone" if self.direction == "forward" else OURS
        run = pdcr.OPERATION.implementation(name).prepare(
            self.size, pdcr.OPERATION.make_inputs(self.size, device)
        )

        def with_launch() -> Result:
            with self._forced():
                return run()

        return with_launch

    def _forced(self) -> AbstractContextManager[None]:
        if self.launch is None:
            return nullcontext()
        from contrastseg_fast.kernels._tuning import Launch, forced  # needs Triton

        return forced(f"pdcr_{self.direction} ", Launch(*self.launch))  # as plan.py names its families


def units(trial: bool) -> Iterator[Unit]:
    """All of them, the tables' choice first at each size; in a trial few, at tiny sizes."""
    for size in SWEEP[:2] if trial else SWEEP:
        for direction, launches in LAUNCHES.items():
            for launch in launches[:2] if trial else launches:
                if launch is not None and launch[4:] == (True,) and size.channels < 128:
                    continue  # Triton's kernel would serve
                yield Unit(pdcr.OPERATION.tiny(size) if trial else size, direction, launch)


def measure(unit: Unit, device: str, expected: Result | None) -> tuple[dict[str, Any], Result | None]:
    """A row about a unit, and its results; one that does not fit the card, or is wrong, has no seconds.

    Args:
        expected: the results under the tables' launch.
    """
    row: dict[str, Any] = {"size": str(unit.size), "direction": unit.direction, "launch": unit.launch}
    try:
        run = unit.prepare(device)
        result = run()
        if expected is not None:
            row["difference"] = normwise_error(result, expected)
            if row["difference"] > pdcr.OPERATION.tolerance(unit.size):
                return row | {"failed": f"differs by {row['difference']:.1g} from the tables' launch"}, result
        row["seconds"] = _seconds(run, device)
    except Exception as failure:  # such as more shared memory than the card has
        if device == "cuda":
            device_timing.check_still_works()
        return row | {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}, None
    return row, result


def best(found: list[rows.Row]) -> list[rows.Row]:
    """The fastest launch for each size and direction, beside the tables'."""
    by_kernel: dict[tuple[str, str], list[rows.Row]] = {}
    for row in found:
        if "seconds" in row:
            by_kernel.setdefault((row["size"], row["direction"]), []).append(row)
    chosen = []
    for (size, direction), timed in by_kernel.items():
        fastest = min(timed, key=lambda row: row["seconds"])
        table = [row["seconds"] for row in timed if row["launch"] is None]
        chosen.append(
            {
                "size": size,
                "direction": direction,
                "launch": fastest["launch"],
                "seconds": fastest["seconds"],
                "tables": table[0] if table else None,
            }
        )
    return chosen


def _seconds(run: Run, device: str) -> float:
    if device == "cuda":
        return device_timing.replayed_seconds(run)
    since = time.perf_counter()
    run()
    return time.perf_counter() - since


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file that gets a row for each launch")
    parser.add_argument("--trial", action="store_true", help="few launches at tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.trial else "cuda"
    expected: dict[tuple[pdcr.Size, str], Result | None] = {}
    for unit in units(options.trial):
        key = unit.size, unit.direction
        row, result = measure(unit, device, expected.get(key))
        if unit.launch is None:
            expected = {key: result}
        rows.append(options.out, row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
