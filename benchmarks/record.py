"""The recorded file: every sample, with the machine, the versions and the command it comes from."""

from __future__ import annotations

import json
import os
import pkgutil
import platform
import re
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.operation import OURS, Case
from benchmarks.timing import Entry, Settings, ratio_of_medians
from contrastseg_fast import ops

RESULTS = Path(__file__).with_name("results")
QUANTILES = (20, 50, 80)
_PACKAGES = ("contrastseg_fast", "torch", "numpy", "monai", "pykeops", "pytest-benchmark")
_ROOT = Path(__file__).resolve().parent.parent

Record = dict[str, Any]


def new(command: str, machine: dict[str, Any], settings: Settings) -> Record:
    """A record without cases; `machine` is pytest-benchmark's machine info."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "machine": {
            "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_code": torch.backends.cpu.get_cpu_capability(),
            "memory_gb": round(physical_bytes() / 1e9, 1),
            "kernels": _kernels(),
            "load_average": os.getloadavg()[0],
            "system": f"{machine['system']} {machine['release']} {machine['machine']}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "settings": asdict(settings),
        "cases": [],
    }


def describe_case(case: Case, entries: dict[str, Entry]) -> dict[str, Any]:
    """A case as it is recorded: quantiles next to the samples, and times relative to ours."""
    operation = case.operation
    described: dict[str, Any] = {
        "id": case.id,
        "operation": operation.name,
        "size": asdict(case.size),
        "device": case.device,
        "checked_size": str(operation.checked(case.size)),
    }
    if operation.memory_unit is not None:
        described["memory_unit_bytes"] = operation.memory_unit(case.size)
    ours = entries.get(OURS, {})
    for entry in entries.values():
        if "seconds" in entry:
            entry["quantiles"] = _quantiles(entry["seconds"])
        if "seconds" in entry and "seconds" in ours:
            within_rounds = [a / b for a, b in zip(entry["seconds"], ours["seconds"], strict=True)]
            entry["over_ours"] = {
                "medians": ratio_of_medians(entry, ours),
                "within_rounds": _quantiles(within_rounds),
            }
    return described | {"implementations": entries}


def save(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(record), indent=1)
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def load(path: Path) -> Record:
    return json.loads(path.read_text())


def physical_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _quantiles(values: list[float]) -> dict[str, float]:
    return {str(q): float(np.percentile(values, q)) for q in QUANTILES}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
        case _:
            return value


def _kernels() -> list[str]:
    """The operators that have a compiled kernel for the CPU; the others run in plain PyTorch."""
    for module in pkgutil.iter_modules(ops.__path__):
        import_module(f"{ops.__name__}.{module.name}")
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("contrastseg_fast::"))
    return [name for name in sorted(names) if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
