"""Measures the selected cases and records each as soon as it is done: as a pytest plugin, or by itself."""

from __future__ import annotations

import gc
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import ceilings, memory, record
from benchmarks.operation import OURS, Case
from benchmarks.table import case_lines, targets_table
from benchmarks.timing import Settings, measure_times

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

BENCH_FILE = Path(__file__).with_name("bench_cases.py")
_PYTEST_OPTIONS = (
    *("-s", "-q", "--tb=short", "--no-header", "--disable-warnings"),
    *("-p", "no:cacheprovider", "-p", "no:logging"),
    *("--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"),
)


class Session:
    """Runs those implementations of the cases whose `case/implementation` matches `pattern`."""

    def __init__(
        self, cases: tuple[Case, ...], pattern: str, settings: Settings, out: Path, device: str = "cpu"
    ) -> None:
        def matches(case: Case, name: str) -> bool:
            return re.search(pattern, f"{case.id}/{name}") is not None

        self._selected = {
            case.id: [each for each in case.implementations if matches(case, each.name)] for case in cases
        }
        self.cases = [case for case in cases if self._selected[case.id]]
        self._settings = settings
        self._out = out
        self._device = device
        self._record: dict[str, Any] = {}

    def selected(self) -> list[str]:
        """What would be measured, a line for each case."""
        return [
            f"{case.id}: {', '.join(each.name for each in self._selected[case.id])}" for case in self.cases
        ]

    def run(self) -> int:
        """Measure, and show the targets; returns pytest's exit status. An interrupt keeps what is done."""
        import pytest

        status = pytest.main([str(BENCH_FILE), *_PYTEST_OPTIONS], plugins=[self])
        self._show_targets()
        return status

    def run_bare(self, budget: float = float("inf")) -> int:
        """Measure without pytest and its plugins, ceilings first; returns 1 if ours failed in a case.

        Cases that `budget` seconds do not reach are recorded as skipped.
        """
        started = time.monotonic()
        self._begin({"cpu": {"brand_raw": record.cpu_name()}, **platform.uname()._asdict()})
        self._record["ceilings"] = ceilings.measure(self._device)
        print("\n".join(ceilings.lines(self._record["ceilings"])), flush=True)
        failed = False
        for case in self.cases:
            if time.monotonic() - started > budget:
                entries = {
                    each.name: {"status": "skipped", "reason": f"after the {budget:g} s given to this part"}
                    for each in self._selected[case.id]
                }
                self._keep(record.describe_case(case, entries))
                continue
            try:
                failed |= self._measure(case, None)
            except torch.OutOfMemoryError as error:
                failed = True
                entries = {OURS: {"status": "failed", "reason": str(error).splitlines()[0]}}
                self._keep(record.describe_case(case, entries))
            gc.collect()
            if self._device == "cuda":
                torch.cuda.empty_cache()
        self._show_targets()
        return int(failed)

    def _show_targets(self) -> None:
        if self._record.get("cases"):
            if targets := targets_table(self._record["cases"]):
                print(targets)
            print(f"recorded in {self._out}")

    def measure(self, case: Case, benchmark: BenchmarkFixture) -> None:
        """Measure a case as a test."""
        if self._measure(case, benchmark):
            import pytest

            pytest.fail(f"{case.id}: ours is wrong or failed", pytrace=False)

    def _measure(self, case: Case, benchmark: BenchmarkFixture | None) -> bool:
        """Measure and record a case; returns whether ours went wrong."""
        implementations = self._selected[case.id]
        entries = measure_times(case, implementations, self._settings, benchmark)
        for implementation in implementations:
            entry = entries[implementation.name]
            if entry["status"] == "measured" and implementation.weighed and case.weighed:
                try:
                    if case.device == "cuda":
                        entry["peak_bytes"] = memory.device_peak_bytes(case, implementation)
                    elif benchmark is not None:
                        entry["peak_bytes"] = memory.peak_bytes(case.id, implementation.name)
                except RuntimeError as error:
                    entry["reason"] = f"no memory: {error}".splitlines()[0]
        self._keep(record.describe_case(case, entries, self._record.get("ceilings")))
        return entries.get(OURS, {}).get("status") in ("wrong", "failed")

    def _keep(self, described: dict[str, Any]) -> None:
        self._record["cases"].append(described)
        record.save(self._record, self._out)
        print("\n".join(case_lines(described)), flush=True)

    def _begin(self, machine: dict[str, Any]) -> None:
        command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
        self._record = record.new(command, machine, self._settings, self._device)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        hook = session.config.hook
        self._begin(hook.pytest_benchmark_generate_machine_info(config=session.config))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        pairs = [(case, self) for case in self.cases]
        metafunc.parametrize(("case", "session"), pairs, ids=[case.id for case in self.cases])

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", "") if report.passed else None
