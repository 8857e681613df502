"""Times the implementations of a case in alternation, after comparing each with the float64 reference."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.operation import Case, Implementation, Inputs, Result, Run, Unavailable

SAMPLE_SECONDS = 0.01  # shorter calls are repeated within one sample
FEWEST_ROUNDS = 3

Entry = dict[str, Any]


class Mismatch(Exception):
    """An implementation computes something else; the message says by how much."""


@dataclass(frozen=True)
class Settings:
    """Limits of a run: rounds at most, seconds for the rounds of one case, bytes of one implementation."""

    rounds: int = 15
    seconds: float = 8.0
    memory_limit: float = 6e9


def measure_times(
    case: Case, implementations: list[Implementation], settings: Settings, benchmark: BenchmarkFixture
) -> dict[str, Entry]:
    """What is known of each implementation, by name: its status with a reason or an error, and its times."""
    torch.compiler.reset()
    checker = _Checker(case)
    inputs = case.operation.make_inputs(case.size, case.device)
    entries: dict[str, Entry] = {}
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for implementation in implementations:
        name = implementation.name
        entries[name] = entry = _admit(case, implementation, settings)
        run = _start(implementation, inputs, checker, entry) if entry["status"] == "measured" else None
        if run is not None:
            runs[name], calls[name] = run, 1
            if case.rounds is None:
                seconds = _seconds(run)
                calls[name] = max(1, ceil(SAMPLE_SECONDS / seconds))
                round_seconds += calls[name] * seconds
    if runs:
        affordable = int(settings.seconds / max(round_seconds, 1e-9))
        rounds = case.rounds or min(settings.rounds, max(FEWEST_ROUNDS, affordable))
        for name, samples in _interleave(runs, calls, rounds, benchmark).items():
            entries[name].update(calls=calls[name], seconds=samples)
    return entries


def _interleave(
    runs: dict[str, Run], calls: dict[str, int], rounds: int, benchmark: BenchmarkFixture
) -> dict[str, list[float]]:
    """Seconds of a call, one sample for each implementation in every round, in an order of its own."""
    shuffler = random.Random(0)
    order = [name for _ in range(rounds) for name in shuffler.sample(sorted(runs), len(runs))]
    upcoming = iter(order)

    def sample(name: str) -> None:
        run = runs[name]
        for _ in range(calls[name]):
            run()

    benchmark.pedantic(sample, setup=lambda: ((next(upcoming),), {}), rounds=len(order))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, duration in zip(order, benchmark.stats.stats.data, strict=True):
        seconds[name].append(duration / calls[name])
    return seconds


def _admit(case: Case, implementation: Implementation, settings: Settings) -> Entry:
    needed = implementation.bytes_needed(case.size)
    reason = implementation.refuse(case.size)
    if reason is None and needed > settings.memory_limit:
        reason = f"needs about {needed / 1e9:.1f} GB; the limit is {settings.memory_limit / 1e9:.1f} GB"
    return {"status": "measured"} if reason is None else {"status": "skipped", "reason": reason}


def _start(implementation: Implementation, inputs: Inputs, checker: _Checker, entry: Entry) -> Run | None:
    """What is timed, checked and warmed up; where there is nothing to time, `entry` gets the reason."""
    try:
        if not implementation.yardstick:
            entry["error"] = checker.error(implementation)
            if entry["error"] > checker.tolerance:
                raise Mismatch(f"off by {entry['error']:.1g} from the float64 reference")
        run = implementation.prepare(checker.case.size, inputs)
        checker.warm_up(implementation, run)
        return run
    except Unavailable as unavailable:
        entry.update(status="skipped", reason=str(unavailable))
    except Mismatch as mismatch:
        entry.update(status="wrong", reason=str(mismatch))
    except Exception as failure:  # a peer that cannot run here must not end the others' measurement
        entry.update(status="failed", reason=f"{type(failure).__name__}: {failure}".splitlines()[0])
    return None


class _Checker:
    """Compares results with the float64 reference, at the case's size or the largest one it can hold."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.size = case.operation.checked(case.size)
        self.tolerance = case.operation.tolerance(case.size)
        self._inputs: Inputs | None = None
        self._expected: Result | None = None
        self._whole: Result | None = None
        self._whole_of = ""

    def error(self, implementation: Implementation) -> float:
        operation = self.case.operation
        if self._inputs is None or self._expected is None:
            self._inputs = operation.make_inputs(self.size, self.case.device)
            self._expected = operation.oracle(self.size, self._inputs)
        return normwise_error(implementation.prepare(self.size, self._inputs)(), self._expected)

    def warm_up(self, implementation: Implementation, run: Run) -> None:
        """Call once; where the float64 reference is out of reach, compare with the first implementation."""
        if self.case.rounds is not None:
            return
        result = run()
        if implementation.yardstick or self.size == self.case.size:
            return
        if self._whole is None:
            self._whole, self._whole_of = result, implementation.name
            return
        difference = normwise_error(result, self._whole)
        if difference > 2 * self.tolerance:
            raise Mismatch(f"differs by {difference:.1g} from {self._whole_of} at this size")


def normwise_error(results: Result, expected: Result) -> float:
    """The largest |actual - expected| / |expected| of the results, infinite where one is not finite."""
    errors = []
    for actual, exact in zip(results, expected, strict=True):
        difference = torch.linalg.vector_norm(actual.double() - exact.double())
        errors.append((difference / torch.linalg.vector_norm(exact.double()).clamp(min=1e-300)).item())
    return max(error if isfinite(error) else float("inf") for error in errors)


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ratio_of_medians(entry: Entry, other: Entry) -> float:
    """How many times as long `entry` takes as `other`, measured in the same rounds."""
    return median(entry["seconds"]) / median(other["seconds"])
