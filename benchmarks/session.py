"""The pytest plugin that measures the selected cases and records each as soon as it is done."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import memory, record
from benchmarks.operation import OURS, Case
from benchmarks.table import case_lines, targets_table
from benchmarks.timing import Settings, measure_times

BENCH_FILE = Path(__file__).with_name("bench_cases.py")
_PYTEST_OPTIONS = (
    *("-s", "-q", "--tb=short", "--no-header", "--disable-warnings"),
    *("-p", "no:cacheprovider", "-p", "no:logging"),
    *("--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"),
)


class Session:
    """Runs those implementations of the cases whose `case/implementation` matches `pattern`."""

    def __init__(self, cases: tuple[Case, ...], pattern: str, settings: Settings, out: Path) -> None:
        def matches(case: Case, name: str) -> bool:
            return re.search(pattern, f"{case.id}/{name}") is not None

        self._selected = {
            case.id: [each for each in case.implementations if matches(case, each.name)] for case in cases
        }
        self.cases = [case for case in cases if self._selected[case.id]]
        self._settings = settings
        self._out = out
        self._record: dict[str, Any] = {}

    def selected(self) -> list[str]:
        """What would be measured, a line for each case."""
        return [
            f"{case.id}: {', '.join(each.name for each in self._selected[case.id])}" for case in self.cases
        ]

    def run(self) -> int:
        """Measure, and show the targets; returns pytest's exit status. An interrupt keeps what is done."""
        status = pytest.main([str(BENCH_FILE), *_PYTEST_OPTIONS], plugins=[self])
        if self._record.get("cases"):
            if targets := targets_table(self._record["cases"]):
                print(targets)
            print(f"recorded in {self._out}")
        return status

    def measure(self, case: Case, benchmark: BenchmarkFixture) -> None:
        implementations = self._selected[case.id]
        entries = measure_times(case, implementations, self._settings, benchmark)
        for implementation in implementations:
            entry = entries[implementation.name]
            if entry["status"] == "measured" and implementation.weighed:
                try:
                    entry["peak_bytes"] = memory.peak_bytes(case.id, implementation.name)
                except RuntimeError as error:
                    entry["reason"] = f"no memory: {error}"
        described = record.describe_case(case, entries)
        self._record["cases"].append(described)
        record.save(self._record, self._out)
        print("\n".join(case_lines(described)), flush=True)
        if entries.get(OURS, {}).get("status") in ("wrong", "failed"):
            pytest.fail(f"{case.id}: ours is {entries[OURS]['status']}", pytrace=False)

    @pytest.fixture
    def session(self) -> Session:
        return self

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        hook = session.config.hook
        machine = hook.pytest_benchmark_generate_machine_info(config=session.config)
        command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
        self._record = record.new(command, machine, self._settings)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", self.cases, ids=[case.id for case in self.cases])

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", "") if report.passed else None
