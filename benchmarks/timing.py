"""Times the implementations of a case in alternation, after comparing each with the float64 reference."""

from __future__ import annotations

import gc
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import device
from benchmarks.operation import Case, Implementation, Inputs, Result, Run, Unavailable

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

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
    case: Case,
    implementations: list[Implementation],
    settings: Settings,
    benchmark: BenchmarkFixture | None = None,
) -> dict[str, Entry]:
    """Status, reason, error, calls per sample and seconds of a call, for each of the implementations.

    Without pytest-benchmark's fixture the clock is read here; on CUDA, events are recorded.
    """
    torch.compiler.reset()
    on_cuda = case.device == "cuda"
    checker = _Checker(case)
    inputs = case.operation.make_inputs(case.size, case.device)
    input_sets = device.input_sets(inputs) if on_cuda and case.operation.rotates else [inputs]
    entries: dict[str, Entry] = {}
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for implementation in implementations:
        name = implementation.name
        entries[name] = entry = _admit(case, implementation, settings)
        run = _start(implementation, input_sets, checker, entry) if entry["status"] == "measured" else None
        if run is not None:
            runs[name], calls[name] = run, 1
            if case.rounds is None:
                if on_cuda:
                    first = device.timed(run, 1)
                    seconds, entry["host_seconds"] = first.on_device, [first.on_host]
                    calls[name] = min(device.MOST_CALLS, ceil(device.SAMPLE_SECONDS / max(seconds, 1e-7)))
                else:
                    seconds = _seconds(run)
                    calls[name] = max(1, ceil(SAMPLE_SECONDS / seconds))
                round_seconds += calls[name] * seconds
    if runs:
        affordable = int(settings.seconds / max(round_seconds, 1e-9))
        rounds = case.rounds or min(settings.rounds, max(FEWEST_ROUNDS, affordable))
        order = _order(list(runs), rounds)
        if on_cuda:
            _sample_device(order, runs, calls, entries)
        else:
            _sample(order, runs, calls, entries, benchmark)
    runs.clear()
    gc.collect()
    return entries


def _order(names: list[str], rounds: int) -> list[str]:
    """Every implementation once in each round, in an order of its own."""
    shuffler = random.Random(0)
    return [name for _ in range(rounds) for name in shuffler.sample(sorted(names), len(names))]


def _sample(
    order: list[str],
    runs: dict[str, Run],
    calls: dict[str, int],
    entries: dict[str, Entry],
    benchmark: BenchmarkFixture | None,
) -> None:
    def sample(name: str) -> None:
        run = runs[name]
        for _ in range(calls[name]):
            run()

    durations: list[float] = []
    if benchmark is None:
        for name in order:
            begin = time.perf_counter()
            sample(name)
            durations.append(time.perf_counter() - begin)
    else:
        upcoming = iter(order)
        benchmark.pedantic(sample, setup=lambda: ((next(upcoming),), {}), rounds=len(order))
        durations = list(benchmark.stats.stats.data)
    for name in runs:
        entries[name].update(calls=calls[name], seconds=[])
    for name, duration in zip(order, durations, strict=True):
        entries[name]["seconds"].append(duration / calls[name])


def _sample_device(
    order: list[str], runs: dict[str, Run], calls: dict[str, int], entries: dict[str, Entry]
) -> None:
    for name in runs:
        entries[name].update(calls=calls[name], seconds=[])
        entries[name].setdefault("host_seconds", [])
    for name in order:
        least = min(entries[name]["host_seconds"], default=1.0)
        sample = device.timed(runs[name], calls[name], least)
        entries[name]["seconds"].append(sample.on_device)
        entries[name]["host_seconds"].append(sample.on_host)


def _admit(case: Case, implementation: Implementation, settings: Settings) -> Entry:
    needed = implementation.bytes_needed(case.size)
    reason = implementation.refuse(case.size, case.device)
    if reason is None and needed > settings.memory_limit:
        reason = f"needs about {needed / 1e9:.1f} GB; the limit is {settings.memory_limit / 1e9:.1f} GB"
    return {"status": "measured"} if reason is None else {"status": "skipped", "reason": reason}


def _start(
    implementation: Implementation, input_sets: list[Inputs], checker: _Checker, entry: Entry
) -> Run | None:
    """What is timed, checked and warmed up; where there is nothing to time, `entry` gets the reason."""
    case = checker.case
    try:
        if not implementation.yardstick:
            entry["error"] = checker.error(implementation)
            if entry["error"] > checker.tolerance:
                raise Mismatch(f"off by {entry['error']:.1g} from the float64 reference")
        runs = [implementation.prepare(case.size, inputs) for inputs in input_sets]
        checker.warm_up(implementation, runs[0])
        if case.device != "cuda":
            return runs[0]
        entry["input_sets"] = len(runs)
        if case.graph:
            expected = runs[0]()
            entry["uncaptured_host_seconds"] = device.host_seconds(runs[0])
            runs = _captured(runs, entry)
            checker.compare("the call itself, replayed", runs[0](), expected)
        return device.taking_turns(runs)
    except Unavailable as unavailable:
        entry.update(status="skipped", reason=str(unavailable))
    except Mismatch as mismatch:
        entry.update(status="wrong", reason=str(mismatch))
    except Exception as failure:  # a peer that cannot run here must not end the others' measurement
        message = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if case.device == "cuda":
            device.check_still_works()
        entry.update(status="failed", reason=message)
    return None


def _captured(runs: list[Run], entry: Entry) -> list[Run]:
    """Replays of the runs' graphs; the runs themselves, and why, where one cannot be captured."""
    try:
        pool = torch.cuda.graph_pool_handle()
        replays = [device.captured(run, pool) for run in runs]
    except Exception as failure:  # such as one that waits for the device
        device.check_still_works()
        entry["graph"] = f"not captured: {type(failure).__name__}: {failure}".splitlines()[0]
        return runs
    entry["graph"] = "captured"
    with suppress(OSError, RuntimeError):  # a count that fails leaves the times
        entry["launches"] = device.launches(runs[0])
    return replays


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
        self.compare(self._whole_of, result, self._whole)

    def compare(self, name: str, result: Result, expected: Result) -> None:
        """Raise if results at the case's own size differ."""
        difference = normwise_error(result, expected)
        if difference > 2 * self.tolerance:
            raise Mismatch(f"differs by {difference:.1g} from {name} at this size")


def normwise_error(results: Result, expected: Result) -> float:
    """The largest |actual - expected| / |expected| of the results, infinite where one is not finite."""
    errors = []
    for actual, exact in zip(results, expected, strict=True):
        difference = torch.linalg.vector_norm(actual.double() - exact.double())
        errors.append((difference / torch.linalg.vector_norm(exact.double()).clamp(min=1e-300)).item())
    return max((error if isfinite(error) else float("inf") for error in errors), default=0.0)


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ratio_of_medians(entry: Entry, other: Entry) -> float:
    """How many times as long `entry` takes as `other`, measured in the same rounds."""
    return median(entry["seconds"]) / median(other["seconds"])
