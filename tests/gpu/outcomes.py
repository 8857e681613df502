"""A pytest plugin that writes what becomes of each test the moment it is known, one JSON object a line.

`pytest -p gpu.outcomes --outcomes FILE`, with `tests` on the path. Beside the outcome a row holds the message
of a failure or the reason of a skip, and the errors that were compared: name, ours, plain PyTorch's, allowed.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows

_MESSAGE = 2000  # characters at most


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="file that gets a row for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes", None)
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the main process
        config.pluginmanager.register(_Writer(path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    from gpu.oracle import COMPARED  # late: it imports conftest, which pytest loads first

    COMPARED.clear()
    try:
        return (yield)
    finally:
        if COMPARED:
            item.user_properties.append(("errors", list(COMPARED)))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, report.nodeid or "collection")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report, report.nodeid)

    def _write(self, report: pytest.CollectReport | pytest.TestReport, test: str) -> None:
        row: dict[str, Any] = {"test": test, "outcome": report.outcome}
        row["seconds"] = round(getattr(report, "duration", 0.0), 3)
        if report.failed:
            row["message"] = _message(report)
        elif report.skipped and isinstance(report.longrepr, tuple):
            row["message"] = report.longrepr[2].removeprefix("Skipped: ")
        row |= dict(getattr(report, "user_properties", ()))
        rows.write(self._path, row)


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What was raised, then the end of the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    raised = "" if crash is None else f"{crash.message}\n"
    return (raised + str(report.longrepr)[-_MESSAGE:])[:_MESSAGE]
