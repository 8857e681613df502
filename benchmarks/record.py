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
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings
from benchmarks.operation import OURS, Case
from benchmarks.timing import Entry, Settings, ratio_of_medians
from contrastseg_fast import _backend, ops

RESULTS = Path(__file__).with_name("results")
QUANTILES = (20, 50, 80)
_PACKAGES = (
    *("contrastseg_fast", "torch", "triton", "numpy", "monai", "torchvision", "segmentation-models-pytorch"),
    *("dynamic-network-architectures", "pykeops", "pytest-benchmark"),
)
_GPU_QUERY = {  # what nvidia-smi calls it
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "highest_sm_clock": "clocks.max.sm",
    "highest_memory_clock": "clocks.max.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
    "utilization": "utilization.gpu",
}
_ROOT = Path(__file__).resolve().parent.parent

Record = dict[str, Any]


def new(
    command: str, machine: dict[str, Any], settings: Settings, device: str = "cpu", commit: str | None = None
) -> Record:
    """A record without cases; `machine` is pytest-benchmark's machine info, or like it.

    `commit` names the sources where they come without git's folder, and `dirty` is then None.
    """
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    on_gpu = {"gpu": gpu(), "gpu_kernels": _kernels("CUDA")} if device == "cuda" else {}
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _git("rev-parse", "HEAD") or "unknown",
        "dirty": None if changes is None else bool(changes),
        "machine": {
            "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_code": torch.backends.cpu.get_cpu_capability(),
            "memory_gb": round(physical_bytes() / 1e9, 1),
            "kernels": _kernels("CPU"),
            "load_average": os.getloadavg()[0],
            "system": f"{machine['system']} {machine['release']} {machine['machine']}",
            **on_gpu,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "settings": asdict(settings),
        "cases": [],
    }


def gpu() -> dict[str, Any]:
    """The current CUDA device, its driver and its clocks as found, and which backends cannot run on it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "unavailable": {name: _backend.unavailable(name, device) for name in ("triton", "cuda")},
        **_clocks(properties.uuid),
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else platform.machine()


def describe_case(
    case: Case, entries: dict[str, Entry], measured_ceilings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A case as it is recorded: quantiles next to the samples, times relative to ours, and to the roofline.

    `share` is the floor's part of an implementation's median time, where ceilings were measured.
    """
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
    work = operation.work
    if measured_ceilings is not None and work is not None:
        inputs = operation.make_inputs(case.size, case.device)
        described["floor"] = ceilings.floor(work(case.size, inputs), measured_ceilings)
        for implementation in case.implementations:
            entry = entries.get(implementation.name, {})
            if "seconds" in entry and not implementation.yardstick:
                entry["share"] = described["floor"]["seconds"] / median(entry["seconds"])
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
    """Write the record in place of the last one, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(record), indent=1)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(
        re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"
    )
    unfinished.replace(path)


def load(path: Path) -> Record:
    """A record; that of `scripts/gpu_check.py` with the cases of all its parts in a row."""
    record = json.loads(path.read_text())
    if "parts" in record:
        results = [part.get("result", {}) for part in record["parts"].values()]
        record["cases"] = [case for result in results for case in result.get("cases", [])]
    return record


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


def _clocks(uuid: Any) -> dict[str, str]:
    """What nvidia-smi says of the card, as it was found."""
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(_GPU_QUERY.values())}",
        "--format=csv,noheader",
    ]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"driver": "unknown"}
    return dict(zip(_GPU_QUERY, (value.strip() for value in line.split(",")), strict=False))


def _kernels(key: str) -> list[str]:
    """The operators that have a kernel of their own for the CPU or CUDA; the others run in plain PyTorch."""
    for module in pkgutil.iter_modules(ops.__path__):
        import_module(f"{ops.__name__}.{module.name}")
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("contrastseg_fast::"))
    return [name for name in sorted(names) if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]


def _git(*arguments: str) -> str | None:
    """What git prints, or None where the sources are not under its control."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
