"""What pytest collects: one test a case, parametrised by the session that runs it."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.operation import Case
from benchmarks.session import Session


def test_case(benchmark: BenchmarkFixture, case: Case, session: Session) -> None:
    session.measure(case, benchmark)
